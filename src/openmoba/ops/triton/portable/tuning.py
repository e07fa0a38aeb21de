"""The portable kernels' tiles, measured on one H200 (docs/kernels.md); correct for any device."""

from __future__ import annotations

from dataclasses import replace

import torch

from openmoba.ops.triton.family import Tile, float32_side, keys_per_share, padded_keys, pairs_per_item
from openmoba.ops.triton.geometry import Geometry


def attend_past(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the past blocks, forward: keys stay on chip where they fit, else one row tile streams them."""
    d, keys = geometry.padded_width, padded_keys(geometry)
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


def attend_own(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the own block and merge."""
    d, keys = geometry.padded_width, padded_keys(geometry)
    if dtype == torch.float32:
        return _float32_tile(geometry)
    if d > 128:
        return Tile(m=min(64, keys), n=min(64, keys), d=d, warps=8, stages=2)
    return Tile(m=min(64, keys), n=min(64, keys), d=d, warps=4, stages=2 if keys <= 128 else 3)


def key_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of keys and values: N keys stay on chip, their rows stream by."""
    d, keys, segment = geometry.padded_width, padded_keys(geometry), pairs_per_item(geometry)
    if dtype == torch.float32:
        return _float32_tile(geometry, segment)
    n = keys_per_share(geometry, dtype)
    if d > 128:
        return Tile(m=32, n=n, d=d, warps=8, stages=2, segment=segment)
    return Tile(m=64, n=n, d=d, warps=8 if keys >= 128 else 4, stages=5, segment=segment)


def query_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of queries from past blocks: one row tile stays on chip, the keys stream by."""
    d, keys = geometry.padded_width, padded_keys(geometry)
    if dtype == torch.float32:
        tile = _float32_tile(geometry)
        return replace(tile, segment=tile.m)
    if d > 128:
        return Tile(m=64, n=min(64, keys), d=d, warps=8, stages=2, segment=64)
    return Tile(m=64, n=min(64, keys), d=d, warps=4, stages=2, segment=64)


def own_key_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of keys and values from the own block, after the partials of the past."""
    d, keys = geometry.padded_width, padded_keys(geometry)
    if dtype == torch.float32:
        return _float32_tile(geometry)
    if d > 128:
        return Tile(m=16, n=min(64, keys), d=d, warps=8, stages=2)
    return Tile(m=min(32, keys), n=min(128, keys), d=d, warps=8 if keys >= 128 else 4, stages=3)


def own_query_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of queries from the own block, after the shares of the past."""
    tile = query_gradients(geometry, dtype)
    return replace(tile, m=min(tile.m, padded_keys(geometry)), n=min(32, tile.n))


def _float32_tile(geometry: Geometry, segment: int = 0) -> Tile:
    """Tile small: products in fp32 take no matrix instructions."""
    side = float32_side(geometry)
    return Tile(m=side, n=side, d=geometry.padded_width, warps=8, stages=1, segment=segment)
