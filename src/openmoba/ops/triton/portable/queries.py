"""Gradients of queries: dQ = scale * sum_j dS k (`gradients`), as shares of pairs and summed.

M query rows, N keys per tile, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

import triton
import triton.language as tl

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import first_row, query_base
from openmoba.ops.triton.plan import block_of_list, item_bounds
from openmoba.ops.triton.rows import (
    LOG2E,
    dot,
    head_base,
    load_queries,
    load_rows,
    own_rows,
    pair_rows,
    reads,
    store_rows,
)


@triton.jit
def _add_keys(k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_MN, dq_MD, scale_log2, MASKED: tl.constexpr):
    """Add the contribution of N keys to dQ / scale."""
    p_MN = tl.exp2(dot(q_MD, tl.trans(k_ND)) * scale_log2 - lse_M[:, None])
    if MASKED:
        p_MN = tl.where(reads_MN, p_MN, 0.0)
    ds_MN = p_MN * (dot(d_out_MD, tl.trans(v_ND)) - delta_M[:, None])
    return dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD)


@triton.jit(
    repr=called("portable_query_gradients"),
    do_not_specialize=["first_head"],
)
def query_gradients(
    d_out, q, k, v, statistics_ptr, shares_ptr, lists, offsets_ptr, call, first_head, all_pairs, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    SHARES: tl.constexpr, SEGMENT: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Work M pairs of one list against all keys of its block: the pairs' share of dQ."""
    _, list_id, begin, end = item_bounds(lists.items, offsets_ptr, tl.program_id(0), call.block_slots, SEGMENT)
    if begin >= end:
        return
    head, sequence, key_begin = block_of_list(list_id, call, PACKED)
    kv_head = first_head + head
    k_base = head_base(k, sequence, kv_head)
    v_base = head_base(v, sequence, kv_head)
    q_base = query_base(q, kv_head, sequence, call, GROUP, PACKED)
    d_out_base = query_base(d_out, kv_head, sequence, call, GROUP, PACKED)
    # An item is one tile of rows here (`tuning`), so that there is one loop, over keys.
    pair, token, member, valid = pair_rows(lists.pairs, begin, end, head * call.rows, GROUP, PAST, M)
    wide = token.to(tl.int64)
    q_MD, d_out_MD, lse_M, delta_M = load_queries(
        d_out_base,
        q_base,
        statistics_ptr,
        wide * d_out.token + member * d_out.head,
        wide * q.token + member * q.head,
        wide * HEADS + kv_head * GROUP + member,
        valid,
        WIDTH,
        D,
    )
    # Rows stay, keys stream by: one share per pair, whatever the block's size, where a share per piece would be many.
    dq_MD = tl.zeros([M, D], tl.float32)
    for at in range(0, call.block_size, N):
        n = at + tl.arange(0, N)
        k_ND = load_rows(k_base, key_begin + n, k.token, n < call.block_size, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v.token, n < call.block_size, WIDTH, D)
        dq_MD = _add_keys(
            k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, (n < call.block_size)[None, :], dq_MD, scale * LOG2E, not EVEN
        )
    # Places beyond the list's end must not write a pair's share again, since their gradients are zero.
    nowhere = tl.cast(all_pairs, tl.int64) * SHARES
    store_rows(shares_ptr, tl.where(valid, pair, nowhere), WIDTH, None, dq_MD, WIDTH, D)


@triton.jit(
    repr=called("portable_own_query_gradients"),
    do_not_specialize=["first_head"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def own_query_gradients(
    d_out, q, k, v, statistics_ptr, shares_ptr, counts_ptr, dq_ptr, call, first_head, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    SHARES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum the pairs' shares of dQ of M queries of a head, add the own block's, write dQ."""
    tiles = tl.cdiv(call.block_size, M)
    block_slot = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * M
    sequence, block, key_begin, block_keys, query_begin, shift = own_rows(block_slot, call, PACKED)
    if (start >= block_keys) | (start + M + shift <= 0):
        return
    # With fewer queries than keys a block may begin before the first query: rows there are not valid.
    head = tl.program_id(1) // GROUP
    member = tl.program_id(1) % GROUP
    kv_head = first_head + head
    q_head_index = (kv_head * GROUP + member).to(tl.int64)
    m = start + tl.arange(0, M)
    valid = (m < block_keys) & (m + shift >= 0)
    flat = first_row(sequence, call, PACKED) + m + shift
    first_M = (head * call.rows + flat * GROUP + member).to(tl.int64) * (PAST * SHARES)
    count_M = None
    if counts_ptr is not None:
        count_M = tl.load(counts_ptr + (head * call.rows + flat * GROUP + member), mask=valid, other=0) * SHARES
    # The past's shares first, in rank order: always the same order, so equal inputs give equal bits.
    dq_MD = tl.zeros([M, D], tl.float32)
    for share in tl.range(0, tl.minimum(block, PAST) * SHARES, num_stages=3):
        reads_M = reads(share, count_M, valid)
        dq_MD += load_rows(shares_ptr, first_M + share, WIDTH, reads_M, WIDTH, D).to(tl.float32)
    k_base = head_base(k, sequence, kv_head)
    v_base = head_base(v, sequence, kv_head)
    token = tl.where(valid, query_begin + m + shift, 0).to(tl.int64)
    q_MD, d_out_MD, lse_M, delta_M = load_queries(
        head_base(d_out, sequence, q_head_index),
        head_base(q, sequence, q_head_index),
        statistics_ptr,
        token * d_out.token,
        token * q.token,
        tl.where(valid, flat, 0).to(tl.int64) * HEADS + q_head_index,
        valid,
        WIDTH,
        D,
    )
    # Up to the tile's last query: later keys are in nobody's past.
    for at in range(0, tl.minimum(start + M, block_keys), N):
        n = at + tl.arange(0, N)
        k_ND = load_rows(k_base, key_begin + n, k.token, n < block_keys, WIDTH, D)
        v_ND = load_rows(v_base, key_begin + n, v.token, n < block_keys, WIDTH, D)
        reads_MN = n[None, :] <= m[:, None]
        dq_MD = _add_keys(k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_MN, dq_MD, scale * LOG2E, True)
    store_rows(dq_ptr + q_head_index * WIDTH, flat, HEADS * WIDTH, valid, dq_MD * scale, WIDTH, D)
