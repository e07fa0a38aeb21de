"""Backward: gradients from the same lists, in fixed order and without atomics, so equal inputs give equal bits.

With P = exp(scale * q k - lse), delta = sum_d dO * O and dS = P * (dO v - delta):

    dV = sum_r P dO        dK = scale * sum_r dS q        dQ = scale * sum_j dS k

`_key_gradients` owns N keys of a block and streams the rows of one item: fp32 partials of dK and dV, and, where the
block has few such tiles (FUSED), the pair's share of dQ. Larger blocks get dQ from `_query_gradients`, which owns M
rows of an item and streams the block's keys. `_own_key_gradients` adds the own block's causal part and sums the
partials in list order; `_own_query_gradients` does the same for dQ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton import hopper
from openmoba.ops.triton.forward import LOG2E, dot, load_rows, own_rows, pair_rows, store_rows
from openmoba.ops.triton.geometry import Geometry, cdiv, first_row, locate, power_of_two, span, strides
from openmoba.ops.triton.plan import Plan, item_bounds, list_bounds, make_items
from openmoba.ops.triton.tuning import (
    Kernel,
    backward_keys_tile,
    backward_own_keys_tile,
    backward_own_queries_tile,
    backward_queries_tile,
)

# A row's statistics take 16 bytes: with fewer elements than a warp group has threads, Triton 3.6 would load them once
# per thread of the matrix layout instead of once per row, which more than doubles the inner loop's instructions.
_STATISTICS = tl.constexpr(4)

# A share of dQ costs its way to memory and back; recomputing S and dP costs two matrix products more per key tile.
_MOST_FUSED_TILES = 4


def dq_pieces(geometry: Geometry, dtype: torch.dtype) -> int:
    """Shares of dQ a pair gets from `_key_gradients`, one per key tile of its block; 0: `_query_gradients` runs."""
    tiles = cdiv(geometry.block_size, backward_keys_tile(geometry, dtype).n)
    return tiles if tiles <= _MOST_FUSED_TILES else 0


def row_statistics(d_out: Tensor, out: Tensor, lse: Tensor, geometry: Geometry) -> Tensor:
    """fp32 `[rows, H, 4]`: base-2 log-sum-exp, delta = <d_out, out>, and two unused."""
    statistics = torch.empty((*lse.shape, _STATISTICS.value), dtype=torch.float32, device=out.device)
    rows, m, d = lse.numel(), 64, power_of_two(geometry.width)
    _row_statistics[(cdiv(rows, m),)](
        d_out, out, lse, statistics, geometry.tokens_q, rows, *strides(d_out), geometry.heads, geometry.width, m, d
    )
    return statistics


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
            _query_gradients[(items.numel(),)](
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
    _own_query_gradients[(geometry.block_slots * tiles, heads * geometry.group)](
        d_out, q, k, v, statistics, partial_dq, dq, *sizes, **meta, **own_tile.launch()
    )


def _key_kernels(geometry: Geometry, *tensors: Tensor) -> tuple[Kernel, Kernel]:
    dtype = tensors[0].dtype
    if hopper.serves(geometry, *tensors):
        return hopper.key_gradients(geometry, dtype), hopper.own_key_gradients(geometry)
    tile, own_tile = backward_keys_tile(geometry, dtype), backward_own_keys_tile(geometry, dtype)
    return Kernel(_key_gradients, tile, tile.launch()), Kernel(_own_key_gradients, own_tile, own_tile.launch())


@triton.jit
def _row_statistics(
    d_out_ptr,
    out_ptr,
    lse_ptr,
    statistics_ptr,
    tokens_q,
    rows,
    d_out_batch,
    d_out_token,
    d_out_head,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0) * M + tl.arange(0, M)
    valid = row < rows
    token = (row // HEADS).to(tl.int64)
    at = token // tokens_q * d_out_batch + token % tokens_q * d_out_token + row % HEADS * d_out_head
    d_out_MD = load_rows(d_out_ptr, at, 1, valid, WIDTH, D).to(tl.float32)
    out_MD = load_rows(out_ptr, row, WIDTH, valid, WIDTH, D).to(tl.float32)
    delta_M = tl.sum(d_out_MD * out_MD, 1)
    lse_M = tl.load(lse_ptr + row, mask=valid, other=0.0) * LOG2E
    c = tl.arange(0, _STATISTICS)
    both_MC = tl.where((c == 0)[None, :], lse_M[:, None], tl.where((c == 1)[None, :], delta_M[:, None], 0.0))
    tl.store(statistics_ptr + row[:, None].to(tl.int64) * _STATISTICS + c[None, :], both_MC, mask=valid[:, None])


@triton.jit
def _key_step(k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_NM, dk_ND, dv_ND, scale_log2, MASKED: tl.constexpr):
    """Add the contribution of M rows to dK / scale and dV; also returns dS transposed, `[N, M]`."""
    p_NM = tl.exp2(dot(k_ND, tl.trans(q_MD)) * scale_log2 - lse_M[None, :])
    if MASKED:
        p_NM = tl.where(reads_NM, p_NM, 0.0)
    dv_ND = dot(p_NM.to(d_out_MD.dtype), d_out_MD, dv_ND)
    ds_NM = p_NM * (dot(v_ND, tl.trans(d_out_MD)) - delta_M[None, :])
    ds_NM = ds_NM.to(q_MD.dtype)
    dk_ND = dot(ds_NM, q_MD, dk_ND)
    return dk_ND, dv_ND, ds_NM


@triton.jit
def _load_queries(
    d_out_base,
    q_base,
    statistics_ptr,
    d_out_at,
    q_at,
    statistic_at,
    valid,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Tiles of queries and output gradients with their base-2 LSE and delta; rows not `valid` get P = 0.

    Their addresses must be readable all the same.
    """
    q_MD = load_rows(q_base, q_at, 1, None, WIDTH, D)
    d_out_MD = load_rows(d_out_base, d_out_at, 1, None, WIDTH, D)
    c = tl.arange(0, _STATISTICS)
    both_MC = tl.load(statistics_ptr + statistic_at[:, None] * _STATISTICS + c[None, :])
    both_MC = tl.where((c == 0)[None, :] & ~valid[:, None], float("inf"), both_MC)
    lse_M = tl.sum(tl.where((c == 0)[None, :], both_MC, 0.0), 1)
    delta_M = tl.sum(tl.where((c == 1)[None, :], both_MC, 0.0), 1)
    return q_MD, d_out_MD, lse_M, delta_M


@triton.jit(do_not_specialize=["first_head"])
def _key_gradients(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    partial_dk_ptr,
    partial_dv_ptr,
    partial_dq_ptr,
    pairs_ptr,
    offsets_ptr,
    items_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    block_slots,
    rows,
    first_head,
    lists,
    scale,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    d_out_batch,
    d_out_token,
    d_out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    SHARES: tl.constexpr,
    SEGMENT: tl.constexpr,
    FUSED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """N keys of a block against the rows of one item: partial dK / scale and dV, and dQ of the pairs if FUSED."""
    # The tiles of a block run side by side: they read the same rows.
    pieces = tl.cdiv(block_size, N)
    item = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    partial_dq_ptr += piece * WIDTH
    list_id, _, begin, end = item_bounds(items_ptr, offsets_ptr, item, lists, block_slots, SEGMENT)
    if begin >= end:
        return
    head = list_id // block_slots
    sequence, block = locate(list_id % block_slots, cu_k_ptr, sequences, tokens_k, block_size, PACKED)
    key_begin, _ = span(sequence, cu_k_ptr, tokens_k, PACKED)
    n = piece * N + tl.arange(0, N)
    key = key_begin + block * block_size + n
    kv_head = first_head + head
    k_base = k_ptr + sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    q_base = q_ptr + kv_head.to(tl.int64) * GROUP * q_head
    d_out_base = d_out_ptr + kv_head.to(tl.int64) * GROUP * d_out_head
    if not PACKED:
        q_base += sequence.to(tl.int64) * (q_batch - tl.cast(tokens_q, tl.int64) * q_token)
        d_out_base += sequence.to(tl.int64) * (d_out_batch - tl.cast(tokens_q, tl.int64) * d_out_token)
    k_ND = load_rows(k_base, key, k_token, n < block_size, WIDTH, D)
    v_ND = load_rows(v_base, key, v_token, n < block_size, WIDTH, D)
    dk_ND = tl.zeros([N, D], tl.float32)
    dv_ND = tl.zeros([N, D], tl.float32)
    nowhere = (lists // block_slots).to(tl.int64) * rows * PAST * SHARES
    for at in range(begin, end, M):
        pair, token, member, valid = pair_rows(pairs_ptr, at, end, head * rows, GROUP, PAST, M)
        wide = token.to(tl.int64)
        q_MD, d_out_MD, lse_M, delta_M = _load_queries(
            d_out_base,
            q_base,
            statistics_ptr,
            wide * d_out_token + member * d_out_head,
            wide * q_token + member * q_head,
            wide * HEADS + kv_head * GROUP + member,
            valid,
            WIDTH,
            D,
        )
        dk_ND, dv_ND, ds_NM = _key_step(
            k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, valid[None, :], dk_ND, dv_ND, scale * LOG2E, False
        )
        if FUSED:
            # Absent keys of the tile are zero, so they add nothing to dQ; absent pairs go to a row nobody reads.
            dq_MD = dot(tl.trans(ds_NM), k_ND)
            share = tl.where(valid, pair.to(tl.int64) * SHARES, nowhere)
            store_rows(partial_dq_ptr, share, WIDTH, None, dq_MD, WIDTH, D)
    at = item.to(tl.int64) * block_size + n
    store_rows(partial_dk_ptr, at, WIDTH, n < block_size, dk_ND, WIDTH, D)
    store_rows(partial_dv_ptr, at, WIDTH, n < block_size, dv_ND, WIDTH, D)


@triton.jit
def _query_step(k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_MN, dq_MD, scale_log2, MASKED: tl.constexpr):
    """Add the contribution of N keys to dQ / scale."""
    p_MN = tl.exp2(dot(q_MD, tl.trans(k_ND)) * scale_log2 - lse_M[:, None])
    if MASKED:
        p_MN = tl.where(reads_MN, p_MN, 0.0)
    ds_MN = p_MN * (dot(d_out_MD, tl.trans(v_ND)) - delta_M[:, None])
    return dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD)


@triton.jit(do_not_specialize=["first_head"])
def _query_gradients(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    partial_dq_ptr,
    pairs_ptr,
    offsets_ptr,
    items_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    block_slots,
    rows,
    first_head,
    lists,
    scale,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    d_out_batch,
    d_out_token,
    d_out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    SHARES: tl.constexpr,
    SEGMENT: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """M pairs of one list against all keys of its block: the pairs' share of dQ."""
    list_id, _, begin, end = item_bounds(items_ptr, offsets_ptr, tl.program_id(0), lists, block_slots, SEGMENT)
    if begin >= end:
        return
    head = list_id // block_slots
    sequence, block = locate(list_id % block_slots, cu_k_ptr, sequences, tokens_k, block_size, PACKED)
    key_begin, _ = span(sequence, cu_k_ptr, tokens_k, PACKED)
    key_begin += block * block_size
    kv_head = first_head + head
    k_base = k_ptr + sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    q_base = q_ptr + kv_head.to(tl.int64) * GROUP * q_head
    d_out_base = d_out_ptr + kv_head.to(tl.int64) * GROUP * d_out_head
    if not PACKED:
        q_base += sequence.to(tl.int64) * (q_batch - tl.cast(tokens_q, tl.int64) * q_token)
        d_out_base += sequence.to(tl.int64) * (d_out_batch - tl.cast(tokens_q, tl.int64) * d_out_token)
    pair, token, member, valid = pair_rows(pairs_ptr, begin, end, head * rows, GROUP, PAST, M)
    wide = token.to(tl.int64)
    q_MD, d_out_MD, lse_M, delta_M = _load_queries(
        d_out_base,
        q_base,
        statistics_ptr,
        wide * d_out_token + member * d_out_head,
        wide * q_token + member * q_head,
        wide * HEADS + kv_head * GROUP + member,
        valid,
        WIDTH,
        D,
    )
    dq_MD = tl.zeros([M, D], tl.float32)
    for at in range(0, block_size, N):
        n = at + tl.arange(0, N)
        k_ND = load_rows(k_base, key_begin + n, k_token, n < block_size, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v_token, n < block_size, WIDTH, D)
        dq_MD = _query_step(
            k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, (n < block_size)[None, :], dq_MD, scale * LOG2E, not EVEN
        )
    nowhere = (lists // block_slots).to(tl.int64) * rows * PAST * SHARES
    store_rows(partial_dq_ptr, tl.where(valid, pair, nowhere), WIDTH, None, dq_MD, WIDTH, D)


@triton.jit(do_not_specialize=["first_head"])
def _own_key_gradients(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    partial_dk_ptr,
    partial_dv_ptr,
    dk_ptr,
    dv_ptr,
    offsets_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    block_slots,
    rows,
    first_head,
    lists,
    scale,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    d_out_batch,
    d_out_token,
    d_out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    SHARES: tl.constexpr,
    SEGMENT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """N keys of a block: go through the block's own queries, add the partials of its items, write dK and dV."""
    pieces = tl.cdiv(block_size, N)
    slot = tl.program_id(0) // pieces
    start = (tl.program_id(0) % pieces) * N
    head = tl.program_id(1)
    sequence, _, key_begin, count, query_begin, shift = own_rows(
        slot, cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, block_size, PACKED
    )
    if start >= count:
        return
    kv_head = first_head + head
    n = start + tl.arange(0, N)
    dk_ND = tl.zeros([N, D], tl.float32)
    dv_ND = tl.zeros([N, D], tl.float32)
    k_base = k_ptr + sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    k_ND = load_rows(k_base, key_begin + n, k_token, n < count, WIDTH, D)
    v_ND = load_rows(v_base, key_begin + n, v_token, n < count, WIDTH, D)
    flat = first_row(sequence, cu_q_ptr, tokens_q, PACKED)
    first = tl.maximum(start, -shift) // M * M
    for member in range(GROUP):
        q_head_index = (kv_head * GROUP + member).to(tl.int64)
        q_base = q_ptr + sequence.to(tl.int64) * q_batch + q_head_index * q_head
        d_out_base = d_out_ptr + sequence.to(tl.int64) * d_out_batch + q_head_index * d_out_head
        for at in range(first, count, M):
            m = at + tl.arange(0, M)
            valid = (m < count) & (m + shift >= 0)
            token = tl.where(valid, query_begin + m + shift, 0).to(tl.int64)
            statistic = tl.where(valid, flat + m + shift, 0).to(tl.int64) * HEADS + q_head_index
            q_MD, d_out_MD, lse_M, delta_M = _load_queries(
                d_out_base, q_base, statistics_ptr, token * d_out_token, token * q_token, statistic, valid, WIDTH, D
            )
            reads_NM = n[:, None] <= m[None, :]
            dk_ND, dv_ND, _ds_NM = _key_step(
                k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_NM, dk_ND, dv_ND, scale * LOG2E, True
            )
    kv_heads = HEADS // GROUP
    key_row = key_begin + n
    if not PACKED:
        key_row += sequence * tokens_k
    list_begin, list_end, item = 0, 0, 0
    if offsets_ptr is not None:
        list_id = head * block_slots + slot
        list_begin, list_end = list_bounds(offsets_ptr, list_id, block_slots)
        item = list_begin // SEGMENT + list_id
    # One sum after the other, and after the loop: both at once would not fit in the registers.
    for part in range(tl.cdiv(list_end - list_begin, SEGMENT)):
        at = tl.cast(item + part, tl.int64) * block_size + n
        dk_ND += load_rows(partial_dk_ptr, at, WIDTH, n < count, WIDTH, D)
    store_rows(dk_ptr + kv_head * WIDTH, key_row, kv_heads * WIDTH, n < count, dk_ND * scale, WIDTH, D)
    for part in range(tl.cdiv(list_end - list_begin, SEGMENT)):
        at = tl.cast(item + part, tl.int64) * block_size + n
        dv_ND += load_rows(partial_dv_ptr, at, WIDTH, n < count, WIDTH, D)
    store_rows(dv_ptr + kv_head * WIDTH, key_row, kv_heads * WIDTH, n < count, dv_ND, WIDTH, D)


@triton.jit(do_not_specialize=["first_head"])
def _own_query_gradients(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    partial_dq_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    block_slots,
    rows,
    first_head,
    lists,
    scale,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    d_out_batch,
    d_out_token,
    d_out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    SHARES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """M queries of one head and block: sum the pairs' shares of dQ, add the own block's, write dQ."""
    tiles = tl.cdiv(block_size, M)
    slot = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * M
    sequence, block, key_begin, count, query_begin, shift = own_rows(
        slot, cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, block_size, PACKED
    )
    if (start >= count) | (start + M + shift <= 0):
        return
    head = tl.program_id(1) // GROUP
    member = tl.program_id(1) % GROUP
    kv_head = first_head + head
    q_head_index = (kv_head * GROUP + member).to(tl.int64)
    m = start + tl.arange(0, M)
    valid = (m < count) & (m + shift >= 0)
    flat = first_row(sequence, cu_q_ptr, tokens_q, PACKED) + m + shift
    first_M = (head * rows + flat * GROUP + member).to(tl.int64) * (PAST * SHARES)
    dq_MD = tl.zeros([M, D], tl.float32)
    for share in tl.range(0, tl.minimum(block, PAST) * SHARES, num_stages=3):
        dq_MD += load_rows(partial_dq_ptr, first_M + share, WIDTH, valid, WIDTH, D).to(tl.float32)
    k_base = k_ptr + sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    token = tl.where(valid, query_begin + m + shift, 0).to(tl.int64)
    q_MD, d_out_MD, lse_M, delta_M = _load_queries(
        d_out_ptr + sequence.to(tl.int64) * d_out_batch + q_head_index * d_out_head,
        q_ptr + sequence.to(tl.int64) * q_batch + q_head_index * q_head,
        statistics_ptr,
        token * d_out_token,
        token * q_token,
        tl.where(valid, flat, 0).to(tl.int64) * HEADS + q_head_index,
        valid,
        WIDTH,
        D,
    )
    for at in range(0, tl.minimum(start + M, count), N):
        n = at + tl.arange(0, N)
        k_ND = load_rows(k_base, key_begin + n, k_token, n < count, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v_token, n < count, WIDTH, D)
        reads_MN = n[None, :] <= m[:, None]
        dq_MD = _query_step(k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_MN, dq_MD, scale * LOG2E, True)
    store_rows(dq_ptr + q_head_index * WIDTH, flat, HEADS * WIDTH, valid, dq_MD * scale, WIDTH, D)
