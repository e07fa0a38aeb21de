"""Route: which past blocks every query reads, exactly, without a score matrix in memory.

    pool         centroids of all blocks                                   reads k once
    gate         streams the centroids past tiles of query rows            reads q once, centroids once per tile
    second look  repeats the rows in which a lane of the gate hid a pick   some rows in a hundred, or none

Scores agree with fp64 up to fp16 rounding of the centroids, and up to 2^-21 of the largest possible score (2^-17 at
8192 blocks, `ranking`): less far apart counts as equal, and of equals the later block wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.triton.gate import choose
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.pool import pool

INT16_SORT_KEYS = 2**15  # sort keys that int16 holds


def route(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, geometry: Geometry, heads_per_sort: int
) -> Tensor:
    """Return the sort keys of the choice, `[Hkv, rows * group, top_k - 1]`, best first; `top_k >= 2`.

    Row r is `flat query token * group + head within the group`. Its value is `(kv_head % heads_per_sort) *
    block_slots + block slot`, and `heads_per_sort * block_slots` for none, which sorts last: int16 where that
    fits, else int32.
    """
    sort_keys = new_sort_keys(geometry, heads_per_sort, q.device)
    write_sort_keys(sort_keys, q, pool(k, cu_k, geometry), cu_q, cu_k, geometry, heads_per_sort)
    return sort_keys


def write_sort_keys(
    sort_keys: Tensor,
    q: Tensor,
    pooled: tuple[Tensor, Tensor],
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    geometry: Geometry,
    heads_per_sort: int,
) -> None:
    """Write the sort keys that `route` describes, of all rows that are of a sequence; `pooled` as `pool` returns it."""
    _, rows, picks = sort_keys.shape
    choose(q, pooled, cu_q, cu_k, geometry, sort_keys, rows * picks, geometry.group * picks, heads_per_sort)


def new_sort_keys(geometry: Geometry, heads_per_sort: int, device: torch.device) -> Tensor:
    """Allocate the sort keys that `route` describes."""
    dtype = torch.int16 if heads_per_sort * geometry.block_slots < INT16_SORT_KEYS else torch.int32
    shape = (geometry.kv_heads, geometry.rows, geometry.top_k - 1)
    return torch.empty(shape, dtype=dtype, device=device)


def select(q: Tensor, k: Tensor, blocking: Blocking) -> Tensor:
    """Do what `openmoba.moba_select` says, for `top_k >= 2`: int32 `[*q.shape[:-1], top_k - 1]`, -1 for none."""
    cu_q, cu_k, block_size, top_k = blocking
    geometry = Geometry.shared(q, k, cu_q, block_size, top_k)
    selected = torch.empty((*q.shape[:-1], top_k - 1), dtype=torch.int32, device=q.device)
    picks = top_k - 1
    choose(
        q, pool(k, cu_k, geometry), cu_q, cu_k, geometry, selected, geometry.group * picks, geometry.heads * picks, 0
    )
    return selected
