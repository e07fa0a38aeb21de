"""Backward: gradients from the same lists, in fixed order and without atomics, so equal inputs give equal bits.

With P = exp(scale * q k - lse), delta = sum_d dO * O and dS = P * (dO v - delta):

    dV = sum_r P dO        dK = scale * sum_r dS q        dQ = scale * sum_j dS k

`key_gradients` owns N keys of a block and streams the rows of one item: fp32 partials of dK and dV, and, where the
block has few such tiles (FUSED), the pair's share of dQ. Larger blocks get dQ from `query_gradients`, which owns M
rows of an item and streams the block's keys. `own_key_gradients` adds the own block's causal part and sums the
partials in list order; `own_query_gradients` does the same for dQ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmoba.ops.triton.arguments import Call, KeyGradients, Lists, Rows
from openmoba.ops.triton.families import family_of
from openmoba.ops.triton.family import Family, Kernel, keys_per_share, pairs_per_item
from openmoba.ops.triton.geometry import Geometry, cdiv, strides
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.plan import Plan, make_items, most_items

# A share of dQ costs its way to memory and back; recomputing S and dP costs two matrix products more per key tile.
_MOST_FUSED_TILES = 4


def dq_pieces(geometry: Geometry, dtype: torch.dtype) -> int:
    """Return how many shares of dQ a pair gets from `key_gradients`; 0: `query_gradients` runs."""
    tiles = cdiv(geometry.block_size, keys_per_share(geometry, dtype))
    return tiles if tiles <= _MOST_FUSED_TILES else 0


def key_partial_bytes(geometry: Geometry) -> int:
    """Return the bytes of one head's fp32 partials of dK and dV, a block for each item, at most."""
    if geometry.pairs == 0:
        return 0
    items = cdiv(geometry.pairs, pairs_per_item(geometry)) + geometry.block_slots
    return 2 * items * geometry.block_size * geometry.width * torch.float32.itemsize


def heads_gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    geometry: Geometry,
    scale: float,
    first_head: int,
    heads: int,
    plan: Plan | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of some key/value heads and of their query heads into `dq`, `dk`, `dv` (contiguous)."""
    launches = _launches(
        geometry, q.dtype, family_of(geometry, d_out, q, k, v), scale, first_head, heads,
        (strides(d_out), strides(q), strides(k), strides(v)),
    )  # fmt: skip
    partial_dq = torch.empty((launches.shares, geometry.width), dtype=q.dtype, device=q.device)
    partial_dk = partial_dv = statistics  # not read without a plan
    offsets = counts = None
    if plan is not None:
        offsets, counts, items = plan.offsets, plan.counts, make_items(plan, geometry, launches.keys_segment)
        shape = (2, len(items), geometry.block_size, geometry.width)
        partial_dk, partial_dv = torch.empty(shape, dtype=torch.float32, device=q.device)
        inputs = (d_out, q, k, v, statistics)
        launches.key_gradients(*inputs, partial_dk, partial_dv, partial_dq, plan.pairs, items, offsets, cu_q, cu_k)
        if launches.query_gradients is not None:
            items = make_items(plan, geometry, launches.queries_segment)
            launches.query_gradients(*inputs, partial_dq, plan.pairs, items, offsets, cu_q, cu_k)
    launches.own_key_gradients(d_out, q, k, v, statistics, partial_dk, partial_dv, dk, dv, offsets, cu_q, cu_k)
    launches.own_query_gradients(d_out, q, k, v, statistics, partial_dq, counts, dq, cu_q, cu_k)


class _Launches(NamedTuple):
    """The steps; no `query_gradients` where `key_gradients` gives the shares of dQ, too.

    The segments are the most pairs per item, `shares` those of dQ: of all pairs, and of one more for places outside a
    list.
    """

    key_gradients: Launch
    keys_segment: int
    query_gradients: Launch | None
    queries_segment: int
    own_key_gradients: Launch
    own_query_gradients: Launch
    shares: int


@lru_cache(maxsize=REMEMBERED)
def _launches(
    geometry: Geometry,
    dtype: torch.dtype,
    family: Family,
    scale: float,
    first_head: int,
    heads: int,
    all_strides: tuple[tuple[int, int, int], ...],
) -> _Launches:
    block_slots = geometry.block_slots
    pairs, lists = heads * geometry.pairs, heads * block_slots
    pieces = dq_pieces(geometry, dtype)
    shares = max(1, pieces)
    constants = {
        "HEADS": geometry.heads,
        "GROUP": geometry.group,
        "PAST": geometry.top_k - 1,
        "WIDTH": geometry.width,
        "PACKED": geometry.packed,
        "SHARES": shares,
    }

    inputs = (*[Rows.of(its) for its in all_strides], TENSOR)
    dk_dv, their_lists, call = KeyGradients(TENSOR, TENSOR), Lists(TENSOR, TENSOR), Call.of(geometry)

    def launch(kernel: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], **more: int) -> Launch:
        return Launch(kernel.function, grid, (*inputs, *arguments, scale), constants | kernel.constants | more)

    def tiles(size: int) -> int:
        return cdiv(geometry.block_size, size)

    of_keys, of_own_keys = family.key_gradients(geometry, dtype), family.own_key_gradients(geometry, dtype)
    of_queries, of_own_queries = family.query_gradients(geometry, dtype), family.own_query_gradients(geometry, dtype)
    segment, queries_segment = of_keys.tile.segment, of_queries.tile.segment
    items, queries_items = (most_items(pairs, lists, most) for most in (segment, queries_segment))
    past = (TENSOR, their_lists, TENSOR, call, first_head, pairs)
    grid, own_grid = (items * tiles(of_keys.tile.n),), (block_slots * tiles(of_own_keys.tile.n), heads)
    own_queries_grid = (block_slots * tiles(of_own_queries.tile.m), heads * geometry.group)
    own = (call, first_head)
    return _Launches(
        key_gradients=launch(of_keys, grid, (dk_dv, *past), SEGMENT=segment, FUSED=pieces > 0),
        keys_segment=segment,
        query_gradients=None if pieces else launch(of_queries, (queries_items,), past, SEGMENT=queries_segment),
        queries_segment=queries_segment,
        own_key_gradients=launch(of_own_keys, own_grid, (dk_dv, dk_dv, TENSOR, *own), SEGMENT=segment),
        own_query_gradients=launch(of_own_queries, own_queries_grid, (TENSOR, TENSOR, TENSOR, *own)),
        shares=(pairs + 1) * shares,
    )
