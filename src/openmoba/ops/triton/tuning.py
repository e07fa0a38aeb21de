"""Tile shapes, measured on one H200 (docs/kernels.md); correct for any device, chosen by head width and block size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openmoba.ops.triton.geometry import Geometry, power_of_two


@dataclass(frozen=True)
class Tile:
    """One kernel's configuration: M rows and N keys per tile, head width D, and the most pairs per item."""

    m: int
    n: int
    d: int
    warps: int
    stages: int
    segment: int = 0

    def launch(self) -> dict[str, int]:
        """The kernel's keyword arguments."""
        return {"M": self.m, "N": self.n, "D": self.d, "num_warps": self.warps, "num_stages": self.stages}


def forward_past_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Past blocks, forward: keys stay on chip where they fit, else one row tile streams them."""
    d, keys = _width(geometry), _keys(geometry)
    if _wide(d, dtype):
        return Tile(m=64, n=32, d=d, warps=4, stages=2, segment=64)
    if keys <= 128:
        # A gather is two dependent loads, so 5 stages hold two tiles in flight; at D=128 they would cost an occupant.
        return Tile(m=64, n=keys, d=d, warps=4, stages=5 if d <= 64 else 3, segment=1024)
    if keys <= 512:
        return Tile(m=64, n=64, d=d, warps=4, stages=3, segment=256)
    return Tile(m=128, n=64, d=d, warps=8, stages=3, segment=512)


def forward_own_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Own block and merge."""
    d, keys = _width(geometry), _keys(geometry)
    if _wide(d, dtype):
        return Tile(m=min(64, keys), n=min(32, keys), d=d, warps=4, stages=2)
    return Tile(m=min(64, keys), n=min(64, keys), d=d, warps=4, stages=2 if keys <= 128 else 3)


def backward_keys_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of keys and values: N keys stay on chip, their rows stream by."""
    d, keys = _width(geometry), _keys(geometry)
    if _wide(d, dtype):
        return Tile(m=32, n=min(32 if dtype.itemsize == 4 else 64, keys), d=d, warps=8, stages=1, segment=4096)
    return Tile(m=64, n=min(128, keys), d=d, warps=8 if keys >= 128 else 4, stages=5, segment=4096)


def backward_own_keys_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of keys and values from the own block, after the partials of the past."""
    d, keys = _width(geometry), _keys(geometry)
    if _wide(d, dtype):
        return backward_keys_tile(geometry, dtype)
    if keys <= 128:
        return Tile(m=min(32, keys), n=keys, d=d, warps=8 if keys >= 128 else 4, stages=3)
    return Tile(m=64, n=64, d=d, warps=4, stages=2)


def backward_queries_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of queries from past blocks: one row tile stays on chip, the keys stream by."""
    d, keys = _width(geometry), _keys(geometry)
    if _wide(d, dtype):
        return Tile(m=32, n=min(32, keys), d=d, warps=4, stages=1, segment=32)
    return Tile(m=64, n=min(64, keys), d=d, warps=4, stages=2, segment=64)


def backward_own_queries_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of queries from the own block, after the shares of the past."""
    tile = backward_queries_tile(geometry, dtype)
    keys = _keys(geometry)
    return Tile(m=min(tile.m, keys), n=min(32 if keys <= 128 else 64, tile.n), d=tile.d, warps=4, stages=tile.stages)


def _width(geometry: Geometry) -> int:
    return power_of_two(max(16, geometry.width))


def _keys(geometry: Geometry) -> int:
    return power_of_two(max(16, geometry.block_size))


def _wide(d: int, dtype: torch.dtype) -> bool:
    """Whether a row takes more than 256 bytes, so that the usual tiles would not fit on chip."""
    return d * dtype.itemsize > 256
