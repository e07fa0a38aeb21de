"""Forward of some heads: past blocks list by list into one partial per pair, then own block and merge.

For row r and block b with keys K_b, values V_b (arXiv 2502.13189, equation 2, split over blocks):

    m = max_j scale * q_r k_j     l = sum_j exp(scale * q_r k_j - m)     o = sum_j exp(... - m) v_j / l

`attend_past` stores o and m + log l of every pair; `attend_own` computes the same over the own block causally and
merges: O = sum_b o_b exp(lse_b - LSE), LSE = log sum_b exp lse_b.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from openmoba.ops.triton.arguments import Call, Lists, Results, Rows, Table
from openmoba.ops.triton.families import family_of
from openmoba.ops.triton.family import Family
from openmoba.ops.triton.geometry import Geometry, cdiv, strides
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.plan import Plan, make_items, most_items


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    geometry: Geometry,
    scale: float,
    first_head: int,
    heads: int,
    tokens: range,
    plan: Plan | None,
    out: Tensor,
    lse: Tensor,
    *table: Tensor,
) -> None:
    """Write the attention of some query tokens, in the query heads of some key/value heads, into `out` and `lse`.

    `tokens` are numbered over all sequences: all of them, or a range of one key/value head with its part of the plan
    (`split_plan`). No plan: own block only. A block table, where the geometry has one, says where the keys are.
    """
    launches = _launches(
        geometry, q.dtype, family_of(geometry, q, k, v), scale, first_head, heads, tokens.start, tokens.stop,
        (strides(q), strides(k), strides(v)),
    )  # fmt: skip
    partial = torch.empty((launches.pairs, geometry.width), dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(launches.pairs, dtype=torch.float32, device=q.device)
    if plan is not None:
        items = make_items(plan, geometry, launches.segment)
        launches.attend_past(
            q, k, v, partial, partial_lse, plan.pairs, items, plan.offsets, plan.skips, cu_q, cu_k, *table
        )
    counts = None if plan is None else plan.counts
    launches.attend_own(q, k, v, partial, partial_lse, counts, out, lse, cu_q, cu_k, *table)


class _Launches(NamedTuple):
    """With the most pairs per item, and the most pairs there can be."""

    attend_past: Launch
    attend_own: Launch
    segment: int
    pairs: int


@lru_cache(maxsize=REMEMBERED)
def _launches(
    geometry: Geometry,
    dtype: torch.dtype,
    family: Family,
    scale: float,
    first_head: int,
    heads: int,
    first_token: int,
    end_token: int,
    qkv_strides: tuple[tuple[int, int, int], ...],
) -> _Launches:
    past = geometry.top_k - 1
    tokens = range(first_token, end_token)
    first_pair = first_token * geometry.group * past
    lists, pairs = heads * geometry.block_slots, heads * len(tokens) * geometry.group * past
    constants = {"GROUP": geometry.group, "PAST": past, "WIDTH": geometry.width}
    constants |= {"PACKED": geometry.packed, "SPLIT": geometry.split}
    kernel, own = family.attend_past(geometry, dtype), family.attend_own(geometry, dtype)
    segment = kernel.tile.segment
    block_slots, span = geometry.own_block_slots(tokens), (first_token, end_token)
    table = None if geometry.paging is None else Table(TENSOR, *geometry.paging)
    call, partials, qkv = Call.of(geometry), Results(TENSOR, TENSOR), [Rows.of(its) for its in qkv_strides]
    return _Launches(
        attend_past=Launch(
            kernel.function,
            (most_items(pairs, lists, segment),),
            (*qkv, partials, Lists(TENSOR, TENSOR), TENSOR, TENSOR, call, table, first_head, first_pair, scale),
            constants | kernel.constants | {"SEGMENT": segment},
        ),
        attend_own=Launch(
            own.function,
            (len(block_slots) * cdiv(geometry.block_size, own.tile.m), heads * geometry.group),
            (*qkv, partials, TENSOR, Results(TENSOR, TENSOR), call, table, first_head, block_slots.start, *span, scale),
            constants | own.constants | {"HEADS": geometry.heads},
        ),
        segment=segment,
        pairs=pairs,
    )
