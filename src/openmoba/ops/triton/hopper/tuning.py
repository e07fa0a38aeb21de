"""The Hopper kernels' tiles, measured on one H100 and one H200 (docs/kernels.md)."""

from __future__ import annotations

import torch

from openmoba.ops.triton.family import Tile, keys_per_share, pairs_per_item
from openmoba.ops.triton.geometry import Geometry

KEYS = 128
"""Block sizes are multiples of it."""

WIDTHS = (64, 128)
"""Head widths."""


def attend_past(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the past blocks, forward: a block of `KEYS` stays in shared memory, a longer one streams by."""
    if geometry.block_size == KEYS:
        return Tile(m=64, n=KEYS, d=geometry.width, warps=4, stages=3, segment=1024)
    m, n = (64, KEYS) if geometry.width == WIDTHS[0] else (128, 64)
    return Tile(m=m, n=n, d=geometry.width, warps=4, stages=2, segment=512)


def attend_own(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the own block and merge."""
    return Tile(m=64, n=64, d=geometry.width, warps=4, stages=2, registers=_registers(geometry))


def key_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of keys and values: N keys stay in shared memory, their rows stream by."""
    n, segment = keys_per_share(geometry, dtype), pairs_per_item(geometry)
    return Tile(m=64, n=n, d=geometry.width, warps=8, stages=3, segment=segment)


def own_key_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of keys and values from the own block, before the partials of the past."""
    return Tile(m=64, n=KEYS, d=geometry.width, warps=8, stages=3)


def own_query_gradients(geometry: Geometry, dtype: torch.dtype) -> Tile:
    """Tile the gradients of queries from the own block, before the shares of the past."""
    return Tile(m=64, n=32, d=geometry.width, warps=4, stages=2, registers=_registers(geometry))


def _registers(geometry: Geometry) -> int:
    """Return how many a thread gets: for three programs of four warps on a multiprocessor, or four of narrow heads."""
    return 128 if geometry.width == WIDTHS[0] else 168
