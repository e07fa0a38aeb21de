"""Kernels in Triton, for every GPU, dtype and shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmoba.ops.triton.family import Family, Kernel, Tile
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.portable import forward, keys, queries, tuning


def why_not(geometry: Geometry, *tensors: Tensor) -> str | None:
    """Return None: these kernels serve all calls."""
    return None


def attend_past(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the past blocks, forward."""
    tile = tuning.attend_past(geometry, dtype)
    resident = tile.n >= geometry.block_size
    return _kernel(forward.attend_past, tile, RESIDENT=resident, EVEN=_is_even(geometry, tile))


def attend_own(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the own block and the merge, forward."""
    return _kernel(forward.attend_own, tuning.attend_own(geometry, dtype))


def key_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of dK and dV from past rows, and of the pairs' shares of dQ."""
    tile = tuning.key_gradients(geometry, dtype)
    return _kernel(keys.key_gradients, tile, EVEN=_is_even(geometry, tile))


def query_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the pairs' dQ."""
    tile = tuning.query_gradients(geometry, dtype)
    return _kernel(queries.query_gradients, tile, EVEN=_is_even(geometry, tile))


def own_key_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the own block's dK and dV, added to those of the past."""
    return _kernel(keys.own_key_gradients, tuning.own_key_gradients(geometry, dtype))


def own_query_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the own block's dQ, added to that of the past."""
    return _kernel(queries.own_query_gradients, tuning.own_query_gradients(geometry, dtype))


def _kernel(function: Any, tile: Tile, **constants: bool) -> Kernel:
    sizes = {"M": tile.m, "N": tile.n, "D": tile.d, "num_warps": tile.warps, "num_stages": tile.stages}
    return Kernel(function, tile, sizes | constants)


def _is_even(geometry: Geometry, tile: Tile) -> bool:
    """Say whether no tile of keys reaches beyond its block."""
    return geometry.block_size % tile.n == 0


FAMILY = Family(
    name="portable",
    why_not=why_not,
    attend_past=attend_past,
    attend_own=attend_own,
    key_gradients=key_gradients,
    query_gradients=query_gradients,
    own_key_gradients=own_key_gradients,
    own_query_gradients=own_query_gradients,
)
