"""Gradients of keys and values: dV = sum_r P dO, dK = scale * sum_r dS q (`gradients`), and the pairs' shares of dQ.

M query rows, N keys per tile, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

import triton
import triton.language as tl

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import first_row, query_base
from openmoba.ops.triton.plan import block_of_list, item_bounds, list_bounds
from openmoba.ops.triton.rows import LOG2E, dot, head_base, load_queries, load_rows, own_rows, pair_rows, store_rows


@triton.jit
def _add_rows(k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_NM, dk_ND, dv_ND, scale_log2, MASKED: tl.constexpr):
    """Add the contribution of M rows to dK / scale and dV; also returns dS transposed, `[N, M]`."""
    p_NM = tl.exp2(dot(k_ND, tl.trans(q_MD)) * scale_log2 - lse_M[None, :])
    if MASKED:
        p_NM = tl.where(reads_NM, p_NM, 0.0)
    dv_ND = dot(p_NM.to(d_out_MD.dtype), d_out_MD, dv_ND)
    ds_NM = p_NM * (dot(v_ND, tl.trans(d_out_MD)) - delta_M[None, :])
    ds_NM = ds_NM.to(q_MD.dtype)
    dk_ND = dot(ds_NM, q_MD, dk_ND)
    return dk_ND, dv_ND, ds_NM


@triton.jit(
    repr=called("portable_key_gradients"),
    do_not_specialize=["first_head"],
)
def key_gradients(
    d_out, q, k, v, statistics_ptr, partials, shares_ptr, lists, offsets_ptr, call, first_head, all_pairs, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    SHARES: tl.constexpr, SEGMENT: tl.constexpr, FUSED: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Work N keys of a block against an item's rows: partial dK / scale and dV, and the pairs' dQ if FUSED."""
    # The tiles of a block run side by side: they read the same rows.
    pieces = tl.cdiv(call.block_size, N)
    piece = tl.program_id(0) % pieces
    shares_ptr += piece * WIDTH
    program = tl.program_id(0) // pieces
    item, list_id, begin, end = item_bounds(lists.items, offsets_ptr, program, call.block_slots, SEGMENT)
    if begin >= end:
        return
    # All pairs of a list are of one block, so that its sequence and keys are found once.
    head, sequence, key_begin = block_of_list(list_id, call, PACKED)
    n = piece * N + tl.arange(0, N)
    key = key_begin + n
    kv_head = first_head + head
    k_base = head_base(k, sequence, kv_head)
    v_base = head_base(v, sequence, kv_head)
    q_base = query_base(q, kv_head, sequence, call, GROUP, PACKED)
    d_out_base = query_base(d_out, kv_head, sequence, call, GROUP, PACKED)
    # Loaded once per item: an item's partials cost memory, so that items are long.
    k_ND = load_rows(k_base, key, k.token, n < call.block_size, WIDTH, D)
    v_ND = load_rows(v_base, key, v.token, n < call.block_size, WIDTH, D)
    dk_ND = tl.zeros([N, D], tl.float32)
    dv_ND = tl.zeros([N, D], tl.float32)
    nowhere = tl.cast(all_pairs, tl.int64) * SHARES
    # Rows stream by, gathered; keys, values and their gradients stay in registers and shared memory.
    for at in range(begin, end, M):
        pair, token, member, valid = pair_rows(lists.pairs, at, end, head * call.rows, GROUP, PAST, M)
        # Addresses in 64 bits: tokens times strides go beyond 2^31 at 1M tokens.
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
        dk_ND, dv_ND, ds_NM = _add_rows(
            k_ND,
            v_ND,
            q_MD,
            d_out_MD,
            lse_M,
            delta_M,
            (n < call.block_size)[:, None],
            dk_ND,
            dv_ND,
            scale * LOG2E,
            not EVEN,
        )
        if FUSED:  # absent pairs go to a row nobody reads
            dq_MD = dot(tl.trans(ds_NM), k_ND)
            share = tl.where(valid, pair.to(tl.int64) * SHARES, nowhere)
            store_rows(shares_ptr, share, WIDTH, None, dq_MD, WIDTH, D)
    # In fp32 and by item: the own block's kernel sums them in list order, whichever program was done first.
    at = item.to(tl.int64) * call.block_size + n
    store_rows(partials.dk, at, WIDTH, n < call.block_size, dk_ND, WIDTH, D)
    store_rows(partials.dv, at, WIDTH, n < call.block_size, dv_ND, WIDTH, D)


@triton.jit(
    repr=called("portable_own_key_gradients"),
    do_not_specialize=["first_head"],
)
def own_key_gradients(
    d_out, q, k, v, statistics_ptr, partials, gradients, offsets_ptr, call, first_head, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    SHARES: tl.constexpr, SEGMENT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Go through the own queries of N keys of a block, add the partials of its items, write dK and dV."""
    pieces = tl.cdiv(call.block_size, N)
    block_slot = tl.program_id(0) // pieces
    start = (tl.program_id(0) % pieces) * N
    head = tl.program_id(1)
    sequence, _, key_begin, block_keys, query_begin, shift = own_rows(block_slot, call, PACKED)
    if start >= block_keys:
        return
    # Keys, values and both sums stay on chip, for all heads of the group: they share the keys, so they share the sums.
    kv_head = first_head + head
    n = start + tl.arange(0, N)
    dk_ND = tl.zeros([N, D], tl.float32)
    dv_ND = tl.zeros([N, D], tl.float32)
    k_base = head_base(k, sequence, kv_head)
    v_base = head_base(v, sequence, kv_head)
    k_ND = load_rows(k_base, key_begin + n, k.token, n < block_keys, WIDTH, D)
    v_ND = load_rows(v_base, key_begin + n, v.token, n < block_keys, WIDTH, D)
    # The block's own queries, head by head of the group, from the first that reads a key of this tile.
    flat = first_row(sequence, call, PACKED)
    first = tl.maximum(start, -shift) // M * M
    for member in range(GROUP):
        q_head_index = (kv_head * GROUP + member).to(tl.int64)
        q_base = head_base(q, sequence, q_head_index)
        d_out_base = head_base(d_out, sequence, q_head_index)
        for at in range(first, block_keys, M):
            m = at + tl.arange(0, M)
            valid = (m < block_keys) & (m + shift >= 0)
            token = tl.where(valid, query_begin + m + shift, 0).to(tl.int64)
            statistic = tl.where(valid, flat + m + shift, 0).to(tl.int64) * HEADS + q_head_index
            q_MD, d_out_MD, lse_M, delta_M = load_queries(
                d_out_base, q_base, statistics_ptr, token * d_out.token, token * q.token, statistic, valid, WIDTH, D
            )
            reads_NM = n[:, None] <= m[None, :]
            dk_ND, dv_ND, _ds_NM = _add_rows(
                k_ND, v_ND, q_MD, d_out_MD, lse_M, delta_M, reads_NM, dk_ND, dv_ND, scale * LOG2E, True
            )
    # What the past gave: the items of a list have neighbouring numbers, the first of which follows from its start.
    kv_heads = HEADS // GROUP
    key_row = key_begin + n
    if not PACKED:
        key_row += sequence * call.tokens_k
    list_begin, list_end, item = 0, 0, 0
    if offsets_ptr is not None:
        list_id = head * call.block_slots + block_slot
        list_begin, list_end = list_bounds(offsets_ptr, list_id, call.block_slots)
        item = list_begin // SEGMENT + list_id
    # One sum after the other, and after the loop: both at once would not fit in the registers.
    for partial in range(tl.cdiv(list_end - list_begin, SEGMENT)):
        at = tl.cast(item + partial, tl.int64) * call.block_size + n
        dk_ND += load_rows(partials.dk, at, WIDTH, n < block_keys, WIDTH, D)
    store_rows(gradients.dk + kv_head * WIDTH, key_row, kv_heads * WIDTH, n < block_keys, dk_ND * scale, WIDTH, D)
    for partial in range(tl.cdiv(list_end - list_begin, SEGMENT)):
        at = tl.cast(item + partial, tl.int64) * call.block_size + n
        dv_ND += load_rows(partials.dv, at, WIDTH, n < block_keys, WIDTH, D)
    store_rows(gradients.dv + kv_head * WIDTH, key_row, kv_heads * WIDTH, n < block_keys, dv_ND, WIDTH, D)
