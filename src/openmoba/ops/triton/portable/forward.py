"""Forward: past blocks list by list into one partial per pair, then own block and merge.

For row r and block b with keys K_b, values V_b (arXiv 2502.13189, equation 2, split over blocks):

    m = max_j scale * q_r k_j     l = sum_j exp(scale * q_r k_j - m)     o = sum_j exp(... - m) v_j / l

`attend_past` stores o and m + log l of every pair; `attend_own` computes the same over the own block causally and
merges: O = sum_b o_b exp(lse_b - LSE), LSE = log sum_b exp lse_b. Inside kernels logarithms have base 2.

Tiles: M rows, N keys, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

import triton
import triton.language as tl

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import first_row, query_base
from openmoba.ops.triton.plan import block_of_list, item_bounds, skipped
from openmoba.ops.triton.rows import (
    LOG2E,
    dot,
    head_base,
    load_rows,
    online_softmax,
    own_rows,
    pair_rows,
    reads,
    store_rows,
)
from openmoba.ops.triton.table import key_row, load_keys


@triton.jit(
    repr=called("portable_attend_past"),
    do_not_specialize=["first_head", "first_pair"],
    do_not_specialize_on_alignment=["offsets_ptr", "skips_ptr"],
)
def attend_past(
    q, k, v, partials, lists, offsets_ptr, skips_ptr, call, table, first_head, first_pair, scale,
    GROUP: tl.constexpr, PAST: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, RESIDENT: tl.constexpr,
    EVEN: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attend the rows of one item to the block they chose. RESIDENT: its keys fit one tile and stay on chip."""
    _, list_id, begin, end = item_bounds(lists.items, offsets_ptr, tl.program_id(0), call.block_slots, SEGMENT)
    if begin >= end:
        return
    begin, end = skipped(begin, end, list_id, skips_ptr)
    # Partials of a range of tokens begin at its first pair (`split_plan`); pairs are numbered through all tokens.
    out_ptr = partials.out - tl.cast(first_pair, tl.int64) * WIDTH
    lse_ptr = partials.lse - first_pair
    head, sequence, key_begin = block_of_list(list_id, call, PACKED)
    kv_head = first_head + head
    # Rows are found by flat numbers through all sequences, keys by their place in the block's own, or in its page.
    batch_row, key_begin = key_row(sequence, key_begin, call, table, SPLIT)
    k_base = head_base(k, batch_row, kv_head)
    v_base = head_base(v, batch_row, kv_head)
    q_base = query_base(q, kv_head, sequence, call, GROUP, PACKED)
    n = tl.arange(0, N)
    scale_log2 = scale * LOG2E
    # A resident block is loaded once, and its rows stream by; a larger one streams past each tile of rows.
    if RESIDENT:
        k_ND, v_ND = load_keys(
            k, v, k_base, v_base, key_begin + n, n < call.block_size, table, sequence, SPLIT, WIDTH, D
        )
    for at in range(begin, end, M):
        # Rows beyond the list's end repeat its last one and store the same again: no mask in the loop.
        pair, token, member, _exists = pair_rows(lists.pairs, at, end, head * call.rows, GROUP, PAST, M)
        q_MD = load_rows(q_base, token.to(tl.int64) * q.token + member * q.head, 1, None, WIDTH, D)
        if RESIDENT:
            s_MN = dot(q_MD, tl.trans(k_ND))
            if not EVEN:
                s_MN = tl.where(n[None, :] < call.block_size, s_MN, -float("inf"))
            m_M = tl.max(s_MN, 1) * scale_log2
            p_MN = tl.exp2(s_MN * scale_log2 - m_M[:, None])
            l_M = tl.sum(p_MN, 1)
            o_MD = dot(p_MN.to(v_ND.dtype), v_ND)
        else:
            # No row sees all keys at once: maximum and sum are kept up to date.
            m_M = tl.full([M], -float("inf"), tl.float32)
            l_M = tl.zeros([M], tl.float32)
            o_MD = tl.zeros([M, D], tl.float32)
            for start in range(0, call.block_size, N):
                inside = start + n < call.block_size
                k_ND, v_ND = load_keys(
                    k, v, k_base, v_base, key_begin + start + n, inside, table, sequence, SPLIT, WIDTH, D
                )
                s_MN = dot(q_MD, tl.trans(k_ND))
                if not EVEN:
                    s_MN = tl.where(inside[None, :], s_MN, -float("inf"))
                m_M, l_M, o_MD = online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2)
        # Normalised here, so that partials are of the inputs' magnitude and 16 bits hold them.
        o_MD = o_MD * (1.0 / l_M)[:, None]
        store_rows(out_ptr, pair, WIDTH, None, o_MD, WIDTH, D)
        tl.store(lse_ptr + pair, m_M + tl.log2(l_M))


@triton.jit(
    repr=called("portable_attend_own"),
    do_not_specialize=["first_head", "first_block_slot", "first_token", "end_token"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def attend_own(
    q, k, v, partials, counts_ptr, results, call, table, first_head, first_block_slot, first_token, end_token, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Merge the partials of M queries of a head, add the own block causally, write output and LSE."""
    tl.static_assert(M % N == 0)  # the loop over earlier keys has no mask
    tiles = tl.cdiv(call.block_size, M)
    block_slot = first_block_slot + tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * M
    sequence, block, key_begin, block_keys, query_begin, shift = own_rows(block_slot, call, PACKED)
    first_query = first_row(sequence, call, PACKED)
    first_flat = first_query + shift
    # Rows of the tile: of the block, of the sequence, of the range of tokens. No maximum of three with a negated term:
    # the ptxas of CUDA 12.8 loses the sign.
    low = tl.maximum(start, tl.maximum(first_token, first_query) - first_flat)
    high = tl.minimum(tl.minimum(start + M, block_keys), end_token - first_flat)
    if low >= high:
        return
    head = tl.program_id(1) // GROUP
    member = tl.program_id(1) % GROUP
    kv_head = first_head + head
    m = start + tl.arange(0, M)
    valid = (m >= low) & (m < high)
    flat = first_flat + m
    q_base = head_base(q, sequence, kv_head * GROUP + member)
    q_MD = load_rows(q_base, query_begin + m + shift, q.token, valid, WIDTH, D)
    count_M = None
    if counts_ptr is not None:
        count_M = tl.load(counts_ptr + (head * call.rows + flat * GROUP + member), mask=valid, other=0)
    # The past first: its loads depend on nothing here, and the softmax goes on from its maximum and sum.
    o_MD, m_M, l_M = _merge_partials(
        partials,
        (head * call.rows + (flat - first_token) * GROUP + member).to(tl.int64) * PAST,
        tl.minimum(block, PAST),
        count_M,
        valid,
        WIDTH,
        M,
        D,
    )
    batch_row, key_begin = key_row(sequence, key_begin, call, table, SPLIT)
    k_base = head_base(k, batch_row, kv_head)
    v_base = head_base(v, batch_row, kv_head)
    scale_log2 = scale * LOG2E
    # Keys before the tile's first query are read by all its rows: no mask.
    for at in range(0, start, N):
        n = at + tl.arange(0, N)
        k_ND, v_ND = load_keys(k, v, k_base, v_base, key_begin + n, n < start, table, sequence, SPLIT, WIDTH, D)
        s_MN = dot(q_MD, tl.trans(k_ND))
        m_M, l_M, o_MD = online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2)
    # On the diagonal, and at the end of the sequence.
    for at in range(start, tl.minimum(start + M, block_keys), N):
        n = at + tl.arange(0, N)
        k_ND, v_ND = load_keys(k, v, k_base, v_base, key_begin + n, n < block_keys, table, sequence, SPLIT, WIDTH, D)
        s_MN = tl.where(n[None, :] <= m[:, None], dot(q_MD, tl.trans(k_ND)), -float("inf"))
        m_M, l_M, o_MD = online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2)
    head_index = kv_head * GROUP + member
    store_rows(results.out + head_index * WIDTH, flat, HEADS * WIDTH, valid, o_MD * (1.0 / l_M)[:, None], WIDTH, D)
    lse_M = (m_M + tl.log2(l_M)) / LOG2E
    tl.store(results.lse + flat.to(tl.int64) * HEADS + head_index, lse_M, mask=valid)


@triton.jit
def _merge_partials(partials, first_M, most, count_M, valid, WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr):
    """Return the sum of a row's partials weighted by exp(lse - maximum), that maximum, and the sum of weights.

    All rows have `most` partials, or `count_M` of them, perhaps none (maximum -inf). Absent ones may hold anything.
    """
    ABSENT: tl.constexpr = 0.0 if count_M is None else -float("inf")
    m_M = tl.full([M], -float("inf"), tl.float32)
    for rank in range(most):
        m_M = tl.maximum(m_M, tl.load(partials.lse + first_M + rank, mask=reads(rank, count_M, valid), other=ABSENT))
    l_M = tl.zeros([M], tl.float32)
    o_MD = tl.zeros([M, D], tl.float32)
    for rank in tl.range(0, most, num_stages=3):
        reads_M = reads(rank, count_M, valid)
        weight_M = tl.exp2(tl.load(partials.lse + first_M + rank, mask=reads_M, other=0.0) - m_M)
        if count_M is not None:
            weight_M = tl.where(reads_M, weight_M, 0.0)
        partial_MD = load_rows(partials.out, first_M + rank, WIDTH, reads_M, WIDTH, D)
        o_MD += partial_MD.to(tl.float32) * weight_M[:, None]
        l_M += weight_M
    return o_MD, m_M, l_M
