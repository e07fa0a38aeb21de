"""Forward: past blocks list by list into one partial per pair, then own block and merge.

For row r and block b with keys K_b, values V_b (arXiv 2502.13189, equation 2, split over blocks):

    m = max_j scale * q_r k_j     l = sum_j exp(scale * q_r k_j - m)     o = sum_j exp(... - m) v_j / l

`_attend_past` stores o and m + log l of every pair; `_attend_own` computes the same over the own block causally and
merges: O = sum_b o_b exp(lse_b - LSE), LSE = log sum_b exp lse_b. Inside kernels logarithms have base 2.

Tiles: M rows, N keys, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton import hopper
from openmoba.ops.triton.geometry import Geometry, cdiv, first_row, locate, query_base, span, strides
from openmoba.ops.triton.launch import REMEMBERED, Launch
from openmoba.ops.triton.plan import Plan, block_of_list, item_bounds, make_items, most_items, skipped
from openmoba.ops.triton.tuning import Kernel, forward_own_tile, forward_past_tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


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
) -> None:
    """Attention of some query tokens in the query heads of some key/value heads, written into `out` and `lse`.

    `tokens` are numbered over all sequences: all of them, or a range of one key/value head with its part of the plan
    (`split_plan`). No plan: own block only.
    """
    launches = _launches(
        geometry, q.dtype, hopper.serves(geometry, q, k, v), scale, first_head, heads, tokens.start, tokens.stop,
        (*strides(q), *strides(k), *strides(v)),
    )  # fmt: skip
    partial = torch.empty((launches.pairs, geometry.width), dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(launches.pairs, dtype=torch.float32, device=q.device)
    if plan is not None:
        items = make_items(plan, geometry, launches.segment)
        launches.past(q, k, v, partial, partial_lse, plan.pairs, plan.offsets, plan.skips, items, cu_q, cu_k)
    counts = None if plan is None else plan.counts
    launches.own(q, k, v, partial, partial_lse, counts, out, lse, cu_q, cu_k)


class _Launches(NamedTuple):
    """With the most pairs per item, and the most pairs there can be."""

    past: Launch
    own: Launch
    segment: int
    pairs: int


@lru_cache(maxsize=REMEMBERED)
def _launches(
    geometry: Geometry,
    dtype: torch.dtype,
    hoppers_own: bool,
    scale: float,
    first_head: int,
    heads: int,
    first_token: int,
    end_token: int,
    qkv_strides: tuple[int, ...],
) -> _Launches:
    rows, past = geometry.rows * geometry.group, geometry.top_k - 1
    tokens = range(first_token, end_token)
    sizes = (geometry.sequences, geometry.tokens_q, geometry.tokens_k, geometry.block_size)
    first_pair = first_token * geometry.group * past
    lists, pairs = heads * geometry.block_slots, heads * len(tokens) * geometry.group * past
    constants = {"GROUP": geometry.group, "PAST": past, "WIDTH": geometry.width, "PACKED": geometry.packed}
    kernel = hopper.attend_past(geometry) if hoppers_own else _past_kernel(geometry, dtype)
    segment = kernel.tile.segment
    own = hopper.attend_own(geometry) if hoppers_own else _own_kernel(geometry, dtype)
    slots = geometry.own_slots(tokens)
    return _Launches(
        past=Launch(
            kernel.function,
            (most_items(pairs, lists, segment),),
            (*sizes, geometry.block_slots, rows, first_head, lists, first_pair, scale, *qkv_strides),
            constants | kernel.constants | {"SEGMENT": segment},
        ),
        own=Launch(
            own.function,
            (len(slots) * cdiv(geometry.block_size, own.tile.m), heads * geometry.group),
            (*sizes, rows, first_head, slots.start, first_token, end_token, scale, *qkv_strides),
            constants | own.constants | {"HEADS": geometry.heads},
        ),
        segment=segment,
        pairs=pairs,
    )


def _past_kernel(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    tile = forward_past_tile(geometry, dtype)
    keys = {"RESIDENT": tile.n >= geometry.block_size, "EVEN": geometry.block_size % tile.n == 0}
    return Kernel(_attend_past, tile, tile.launch() | keys)


def _own_kernel(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    tile = forward_own_tile(geometry, dtype)
    return Kernel(_attend_own, tile, tile.launch())


@triton.jit
def load_rows(base, at, stride, valid, WIDTH: tl.constexpr, D: tl.constexpr):
    """Rows `at` of a strided matrix, `[len(at), D]`: zero where not `valid` (None: all are) and beyond WIDTH."""
    d = tl.arange(0, D)
    pointers = base + at[:, None].to(tl.int64) * stride + d[None, :]
    if valid is None:
        if D == WIDTH:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=d[None, :] < WIDTH, other=0.0)
    elif D == WIDTH:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=valid[:, None] & (d[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(base, at, stride, valid, x, WIDTH: tl.constexpr, D: tl.constexpr):
    """Inverse of `load_rows`."""
    d = tl.arange(0, D)
    pointers = base + at[:, None].to(tl.int64) * stride + d[None, :]
    x = x.to(base.dtype.element_ty)
    if valid is None:
        if D == WIDTH:
            tl.store(pointers, x)
        else:
            tl.store(pointers, x, mask=d[None, :] < WIDTH)
    else:
        tl.store(pointers, x, mask=valid[:, None] & (d[None, :] < WIDTH))


@triton.jit
def dot(a, b, acc=None):
    """Matrix product accumulated in fp32; fp32 operands are not rounded to TF32."""
    if a.dtype == tl.float32:
        product = _dot_float32(a, b)
        if acc is None:
            return product
        else:
            return _add(product, acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _dot_float32(a, b):
    """Sums of at most 64 products, added in pairs: the rounding error of one long sum grows with its length."""
    if a.shape[1] > 64:
        a_even, a_odd = _columns(a)
        b_even, b_odd = _columns(tl.trans(b))
        return _add(_dot_float32(a_even, tl.trans(b_even)), _dot_float32(a_odd, tl.trans(b_odd)))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _columns(x):
    """The even and the odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _add(x, y):
    """x + y; as a plain sum, the compiler would let one product go on from where the other ends."""
    return tl.fma(x, tl.full(x.shape, 1.0, tl.float32), y)


@triton.jit
def pair_rows(pairs_ptr, begin, end, head_rows, GROUP: tl.constexpr, PAST: tl.constexpr, M: tl.constexpr):
    """M pairs of a list: pair, its flat query token, its head within the group, and which of them exist.

    Places beyond the end repeat the last pair: addresses need no mask, and the same result is stored twice.
    `head_rows` is the number of rows of the key/value heads before this one in the plan.
    """
    at = begin + tl.arange(0, M)
    pair = tl.load(pairs_ptr + tl.minimum(at, end - 1))
    row = pair // PAST - head_rows
    return pair, row // GROUP, row % GROUP, at < end


@triton.jit(do_not_specialize=["first_head", "first_pair"], do_not_specialize_on_alignment=["offsets_ptr", "skips_ptr"])
def _attend_past(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,
    partial_lse_ptr,
    pairs_ptr,
    offsets_ptr,
    skips_ptr,
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
    first_pair,
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
    GROUP: tl.constexpr,
    PAST: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """One item: rows that chose a block, against that block. RESIDENT: its keys fit one tile and stay on chip."""
    _, list_id, begin, end = item_bounds(items_ptr, offsets_ptr, tl.program_id(0), block_slots, SEGMENT)
    if begin >= end:
        return
    begin, end = skipped(begin, end, list_id, skips_ptr)
    partial_ptr -= tl.cast(first_pair, tl.int64) * WIDTH
    partial_lse_ptr -= first_pair
    head, sequence, key_begin = block_of_list(list_id, cu_k_ptr, sequences, tokens_k, block_size, block_slots, PACKED)
    kv_head = first_head + head
    k_base = k_ptr + sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    q_base = query_base(q_ptr, kv_head, sequence, tokens_q, q_batch, q_token, q_head, GROUP, PACKED)
    n = tl.arange(0, N)
    scale_log2 = scale * LOG2E
    if RESIDENT:
        k_ND = load_rows(k_base, key_begin + n, k_token, n < block_size, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v_token, n < block_size, WIDTH, D)
    for at in range(begin, end, M):
        pair, token, member, _exists = pair_rows(pairs_ptr, at, end, head * rows, GROUP, PAST, M)
        q_MD = load_rows(q_base, token.to(tl.int64) * q_token + member * q_head, 1, None, WIDTH, D)
        if RESIDENT:
            s_MN = dot(q_MD, tl.trans(k_ND))
            if not EVEN:
                s_MN = tl.where(n[None, :] < block_size, s_MN, -float("inf"))
            m_M = tl.max(s_MN, 1) * scale_log2
            p_MN = tl.exp2(s_MN * scale_log2 - m_M[:, None])
            l_M = tl.sum(p_MN, 1)
            o_MD = dot(p_MN.to(v_ND.dtype), v_ND)
        else:
            m_M = tl.full([M], -float("inf"), tl.float32)
            l_M = tl.zeros([M], tl.float32)
            o_MD = tl.zeros([M, D], tl.float32)
            for start in range(0, block_size, N):
                inside = start + n < block_size
                k_ND = load_rows(k_base, key_begin + start + n, k_token, inside, WIDTH, D)
                v_ND = load_rows(v_base, key_begin + start + n, v_token, inside, WIDTH, D)
                s_MN = dot(q_MD, tl.trans(k_ND))
                if not EVEN:
                    s_MN = tl.where(inside[None, :], s_MN, -float("inf"))
                m_M, l_M, o_MD = online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2)
        o_MD = o_MD * (1.0 / l_M)[:, None]
        store_rows(partial_ptr, pair, WIDTH, None, o_MD, WIDTH, D)
        tl.store(partial_lse_ptr + pair, m_M + tl.log2(l_M))


@triton.jit
def online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2):
    """Fold a tile of inner products and its values into running maximum (base 2), sum and output."""
    m_new_M = tl.maximum(m_M, tl.max(s_MN, 1) * scale_log2)
    alpha_M = tl.exp2(m_M - m_new_M)
    p_MN = tl.exp2(s_MN * scale_log2 - m_new_M[:, None])
    o_MD = dot(p_MN.to(v_ND.dtype), v_ND, o_MD * alpha_M[:, None])
    return m_new_M, l_M * alpha_M + tl.sum(p_MN, 1), o_MD


@triton.jit
def own_rows(slot, cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, block_size, PACKED: tl.constexpr):
    """Sequence and number of a block slot, its keys, and its queries.

    Returns (sequence, block, first key of the block, its key count, first query of the sequence, `shift`), where
    key i of the block has query number `i + shift` in the sequence, absent if negative. Empty slots have no keys.
    """
    sequence, block = locate(slot, cu_k_ptr, sequences, tokens_k, block_size, PACKED)
    key_begin, keys = span(sequence, cu_k_ptr, tokens_k, PACKED)
    query_begin, queries = span(sequence, cu_q_ptr, tokens_q, PACKED)
    count = tl.minimum(keys - block * block_size, block_size)
    return sequence, block, key_begin + block * block_size, count, query_begin, block * block_size + queries - keys


@triton.jit
def reads(rank, count_M, valid):
    """Which rows read a past block of this rank: all valid ones, or by `count_M`, which is 0 for rows not valid."""
    if count_M is None:
        return valid
    else:
        return rank < count_M


@triton.jit(
    do_not_specialize=["first_head", "first_slot", "first_token", "end_token"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def _attend_own(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,
    partial_lse_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    rows,
    first_head,
    first_slot,
    first_token,
    end_token,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """M queries of one head and block: merge their partials, add the own block causally, write output and LSE."""
    tl.static_assert(M % N == 0)  # the loop over earlier keys has no mask
    tiles = tl.cdiv(block_size, M)
    slot = first_slot + tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * M
    sequence, block, key_begin, count, query_begin, shift = own_rows(
        slot, cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, block_size, PACKED
    )
    first_query = first_row(sequence, cu_q_ptr, tokens_q, PACKED)
    first_flat = first_query + shift
    # Rows of the tile: of the block, of the sequence, of the range of tokens. No maximum of three with a negated term:
    # the ptxas of CUDA 12.8 loses the sign.
    low = tl.maximum(start, tl.maximum(first_token, first_query) - first_flat)
    high = tl.minimum(tl.minimum(start + M, count), end_token - first_flat)
    if low >= high:
        return
    head = tl.program_id(1) // GROUP
    member = tl.program_id(1) % GROUP
    kv_head = first_head + head
    m = start + tl.arange(0, M)
    valid = (m >= low) & (m < high)
    flat = first_flat + m
    q_base = q_ptr + sequence.to(tl.int64) * q_batch + (kv_head * GROUP + member).to(tl.int64) * q_head
    q_MD = load_rows(q_base, query_begin + m + shift, q_token, valid, WIDTH, D)
    count_M = None
    if counts_ptr is not None:
        count_M = tl.load(counts_ptr + (head * rows + flat * GROUP + member), mask=valid, other=0)
    o_MD, m_M, l_M = _merge_partials(
        partial_ptr,
        partial_lse_ptr,
        (head * rows + (flat - first_token) * GROUP + member).to(tl.int64) * PAST,
        tl.minimum(block, PAST),
        count_M,
        valid,
        WIDTH,
        M,
        D,
    )
    k_base = k_ptr + sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    scale_log2 = scale * LOG2E
    for at in range(0, start, N):
        n = at + tl.arange(0, N)
        k_ND = load_rows(k_base, key_begin + n, k_token, n < start, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v_token, n < start, WIDTH, D)
        s_MN = dot(q_MD, tl.trans(k_ND))
        m_M, l_M, o_MD = online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2)
    for at in range(start, tl.minimum(start + M, count), N):
        n = at + tl.arange(0, N)
        k_ND = load_rows(k_base, key_begin + n, k_token, n < count, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v_token, n < count, WIDTH, D)
        s_MN = tl.where(n[None, :] <= m[:, None], dot(q_MD, tl.trans(k_ND)), -float("inf"))
        m_M, l_M, o_MD = online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2)
    head_index = kv_head * GROUP + member
    store_rows(out_ptr + head_index * WIDTH, flat, HEADS * WIDTH, valid, o_MD * (1.0 / l_M)[:, None], WIDTH, D)
    lse_M = (m_M + tl.log2(l_M)) / LOG2E
    tl.store(lse_ptr + flat.to(tl.int64) * HEADS + head_index, lse_M, mask=valid)


@triton.jit
def _merge_partials(
    partial_ptr, partial_lse_ptr, first_M, most, count_M, valid, WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr
):
    """Sum of a row's partials weighted by exp(lse - maximum), that maximum, and the sum of weights.

    All rows have `most` partials, or `count_M` of them, perhaps none (maximum -inf). Absent ones may hold anything.
    """
    ABSENT: tl.constexpr = 0.0 if count_M is None else -float("inf")
    m_M = tl.full([M], -float("inf"), tl.float32)
    for rank in range(most):
        m_M = tl.maximum(m_M, tl.load(partial_lse_ptr + first_M + rank, mask=reads(rank, count_M, valid), other=ABSENT))
    l_M = tl.zeros([M], tl.float32)
    o_MD = tl.zeros([M, D], tl.float32)
    for rank in tl.range(0, most, num_stages=3):
        reads_M = reads(rank, count_M, valid)
        weight_M = tl.exp2(tl.load(partial_lse_ptr + first_M + rank, mask=reads_M, other=0.0) - m_M)
        if count_M is not None:
            weight_M = tl.where(reads_M, weight_M, 0.0)
        part_MD = load_rows(partial_ptr, first_M + rank, WIDTH, reads_M, WIDTH, D)
        o_MD += part_MD.to(tl.float32) * weight_M[:, None]
        l_M += weight_M
    return o_MD, m_M, l_M
