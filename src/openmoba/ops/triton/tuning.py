"""Tile shapes, measured on one H200 (docs/kernels.md); correct for any device, chosen by head width and block size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


class Kernel(NamedTuple):
    """What to launch: a compiled function, the tile that its grid is made of, and its keyword arguments."""

    function: Any
    tile: Tile
    constants: dict[str, Any]


def forward_past_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Past blocks, forward: keys stay on chip where they fit, else one row tile streams them."""
    d, keys = geometry.padded_width, _keys(geometry)
    if dtype == torch.float32:
        return _float32_tile(geometry, segment=128)
    if d > 128:
        return Tile(m=128, n=32, d=d, warps=8, stages=2, segment=128)
    if keys <= 128:
        # A gather is two dependent loads, so 5 stages hold two tiles in flight; at D=128 they would cost an occupant.
        return Tile(m=64, n=keys, d=d, warps=4, stages=5 if d <= 64 else 3, segment=1024)
    if keys <= 512:
        return Tile(m=64, n=64, d=d, warps=4, stages=3, segment=256)
    return Tile(m=128, n=64, d=d, warps=8, stages=3, segment=512)


def forward_own_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Own block and merge."""
    d, keys = geometry.padded_width, _keys(geometry)
    if dtype == torch.float32:
        return _float32_tile(geometry)
    if d > 128:
        return Tile(m=min(64, keys), n=min(64, keys), d=d, warps=8, stages=2)
    return Tile(m=min(64, keys), n=min(64, keys), d=d, warps=4, stages=2 if keys <= 128 else 3)


def backward_keys_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of keys and values: N keys stay on chip, their rows stream by."""
    d, keys = geometry.padded_width, _keys(geometry)
    # Each item has fp32 partials of its whole block: with 8 pairs per key they take half as much as bf16 shares of dQ.
    segment = max(4096, 8 * keys)
    if dtype == torch.float32:
        return _float32_tile(geometry, segment)
    if d > 128:
        return Tile(m=32, n=min(64, keys), d=d, warps=8, stages=2, segment=segment)
    return Tile(m=64, n=min(128, keys), d=d, warps=8 if keys >= 128 else 4, stages=5, segment=segment)


def backward_own_keys_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of keys and values from the own block, after the partials of the past."""
    d, keys = geometry.padded_width, _keys(geometry)
    if dtype == torch.float32:
        return _float32_tile(geometry)
    if d > 128:
        return Tile(m=16, n=min(64, keys), d=d, warps=8, stages=2)
    return Tile(m=min(32, keys), n=min(128, keys), d=d, warps=8 if keys >= 128 else 4, stages=3)


def backward_queries_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of queries from past blocks: one row tile stays on chip, the keys stream by."""
    d, keys = geometry.padded_width, _keys(geometry)
    if dtype == torch.float32:
        tile = _float32_tile(geometry)
        return replace(tile, segment=tile.m)
    if d > 128:
        return Tile(m=64, n=min(64, keys), d=d, warps=8, stages=2, segment=64)
    return Tile(m=64, n=min(64, keys), d=d, warps=4, stages=2, segment=64)


def backward_own_queries_tile(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Gradients of queries from the own block, after the shares of the past."""
    tile = backward_queries_tile(geometry, dtype)
    keys = _keys(geometry)
    return replace(tile, m=min(tile.m, keys), n=min(32, tile.n))


def _keys(geometry: Geometry) -> int:
    return power_of_two(max(16, geometry.block_size))


def _float32_tile(geometry: Geometry, segment: int = 0) -> Tile:
    """Products in fp32 take no matrix instructions and keep their operands in registers: small tiles."""
    d = geometry.padded_width
    side = min(32 if d <= 64 else 16, _keys(geometry))
    return Tile(m=side, n=side, d=d, warps=8, stages=1, segment=segment)
