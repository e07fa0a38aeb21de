"""Backward: gradients from the same lists, in fixed order and without atomics, so equal inputs give equal bits.

With P = exp(scale * q k - lse), delta = sum_d dO * O and dS = P * (dO v - delta):

    dV = sum_r P dO        dK = scale * sum_r dS q        dQ = scale * sum_j dS k

`key_gradients` owns N keys of a block and streams the rows of one item: fp32 partials of dK and dV, and, where the
block has few such tiles (FUSED), the pair's share of dQ. Larger blocks get dQ from `query_gradients`, which owns M
rows of an item and streams the block's keys. `own_key_gradients` adds the own block's causal part and sums the
partials in list order; `own_query_gradients` does the same for dQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmoba.ops.triton import hopper
from openmoba.ops.triton.backward_keys import key_gradients, own_key_gradients
from openmoba.ops.triton.backward_queries import own_query_gradients, query_gradients
from openmoba.ops.triton.geometry import Geometry, cdiv, strides
from openmoba.ops.triton.plan import Plan, make_items
from openmoba.ops.triton.tuning import (
    Kernel,
    backward_keys_tile,
    backward_own_keys_tile,
    backward_own_queries_tile,
    backward_queries_tile,
)

# A share of dQ costs its way to memory and back; recomputing S and dP costs two matrix products more per key tile.
_MOST_FUSED_TILES = 4


def dq_pieces(geometry: Geometry, dtype: torch.dtype) -> int:
    """Shares of dQ a pair gets from `key_gradients`, one per key tile of its block; 0: `query_gradients` runs."""
    tiles = cdiv(geometry.block_size, backward_keys_tile(geometry, dtype).n)
    return tiles if tiles <= _MOST_FUSED_TILES else 0


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
    """Gradients of some key/value heads and of their query heads, written into `dq`, `dk`, `dv` (contiguous)."""
    rows, past = geometry.rows * geometry.group, geometry.top_k - 1
    key_kernel, own_kernel = _key_kernels(geometry, d_out, q, k, v)
    key_tile, own_tile = key_kernel.tile, own_kernel.tile
    query_tile = backward_queries_tile(geometry, q.dtype)
    pieces = dq_pieces(geometry, q.dtype)
    fused = pieces > 0
    shares = max(1, pieces)
    partial_dq = torch.empty((heads * rows * past * shares + shares, geometry.width), dtype=q.dtype, device=q.device)
    sizes = (
        cu_q,
        cu_k,
        geometry.sequences,
        geometry.tokens_q,
        geometry.tokens_k,
        geometry.block_size,
        geometry.block_slots,
        rows,
        first_head,
        heads * geometry.block_slots,
        scale,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(d_out),
    )
    meta = {
        "HEADS": geometry.heads,
        "GROUP": geometry.group,
        "PAST": past,
        "WIDTH": geometry.width,
        "PACKED": geometry.packed,
        "SHARES": shares,
    }
    partial_dk = partial_dv = statistics  # not read without a plan
    offsets = None
    if plan is not None:
        offsets, items = plan.offsets, make_items(plan, geometry, key_tile.segment)
        shape = (2, items.numel(), geometry.block_size, geometry.width)
        partial_dk, partial_dv = torch.empty(shape, dtype=torch.float32, device=q.device)
        key_kernel.function[(items.numel() * cdiv(geometry.block_size, key_tile.n),)](
            d_out,
            q,
            k,
            v,
            statistics,
            partial_dk,
            partial_dv,
            partial_dq,
            plan.pairs,
            offsets,
            items,
            *sizes,
            **meta,
            SEGMENT=key_tile.segment,
            FUSED=fused,
            **key_kernel.constants,
        )
        if not fused:
            items = make_items(plan, geometry, query_tile.segment)
            query_gradients[(items.numel(),)](
                d_out,
                q,
                k,
                v,
                statistics,
                partial_dq,
                plan.pairs,
                offsets,
                items,
                *sizes,
                **meta,
                SEGMENT=query_tile.segment,
                EVEN=geometry.block_size % query_tile.n == 0,
                **query_tile.launch(),
            )
    own_kernel.function[(geometry.block_slots * cdiv(geometry.block_size, own_tile.n), heads)](
        d_out,
        q,
        k,
        v,
        statistics,
        partial_dk,
        partial_dv,
        dk,
        dv,
        offsets,
        *sizes,
        **meta,
        SEGMENT=key_tile.segment,
        **own_kernel.constants,
    )
    own_tile = backward_own_queries_tile(geometry, q.dtype)
    tiles = cdiv(geometry.block_size, own_tile.m)
    own_query_gradients[(geometry.block_slots * tiles, heads * geometry.group)](
        d_out, q, k, v, statistics, partial_dq, dq, *sizes, **meta, **own_tile.launch()
    )


def _key_kernels(geometry: Geometry, *tensors: Tensor) -> tuple[Kernel, Kernel]:
    dtype = tensors[0].dtype
    if hopper.serves(geometry, *tensors):
        return hopper.key_gradients(geometry, dtype), hopper.own_key_gradients(geometry)
    tile, own_tile = backward_keys_tile(geometry, dtype), backward_own_keys_tile(geometry, dtype)
    return Kernel(key_gradients, tile, tile.launch()), Kernel(own_key_gradients, own_tile, own_tile.launch())
