"""Gradients of keys and values on Hopper: the portable kernels' namesakes, with matrix products in flight.

While one product runs, the warps do the elementwise work of the one before:

    in flight      meanwhile
    S, dP          dQ of the rows before goes to memory; where later rows are
    dP             P = exp2(scale * S - lse)
    dV += P dO     dS = P (dP - delta), to shared memory
    dQ = dS^T K    copies of later rows begin
    dK += dS q     dQ to shared memory

Rows arrive through STAGES buffers of asynchronous copies. M rows and N keys per tile, D head width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import first_row, query_base
from openmoba.ops.triton.hopper.tiles import (
    VECTOR,
    allocate_ring,
    copy_pairs,
    copy_rows,
    copy_to_shared,
    flat_layout,
    lane_layout,
    pairs_in,
    pairs_of,
    product_layout,
    row_layout,
    row_of,
    stages_around,
    thread_barrier,
    vectors_to,
)
from openmoba.ops.triton.plan import block_of_list, item_bounds, list_bounds
from openmoba.ops.triton.rows import LOG2E, STATISTICS, head_base, own_rows

_ROWS_TOGETHER = gl.constexpr(2**16)  # 34 MB of queries and output gradients, which the L2 cache holds


@gluon.jit
def _allocate_rows(DTYPE: gl.constexpr, STAGES: gl.constexpr, M: gl.constexpr, D: gl.constexpr):
    """Allocate buffers for queries, output gradients, log-sum-exp and delta."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], DTYPE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, M, D], ROWS)
    d_out_smem = gl.allocate_shared_memory(DTYPE, [STAGES, M, D], ROWS)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, M], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, M], FLAT)
    return q_smem, d_out_smem, lse_smem, delta_smem


@gluon.jit
def _copy_queries(rows_smem, stage, q_base, q_at_M, d_out_base, d_out_at_M, statistics_ptr, statistic_at_M,
                  D: gl.constexpr, ROW: gl.constexpr):  # fmt: skip
    """Begin the copies of M queries, their output gradients and statistics into buffer `stage`."""
    q_smem, d_out_smem, lse_smem, delta_smem = rows_smem
    copy_rows(q_smem.index(stage), q_base, q_at_M, D, ROW)
    copy_rows(d_out_smem.index(stage), d_out_base, d_out_at_M, D, ROW)
    statistic = statistics_ptr + statistic_at_M * STATISTICS
    copy_to_shared(lse_smem.index(stage), statistic)
    copy_to_shared(delta_smem.index(stage), statistic + 1)


@gluon.jit
def _allocate_addresses(M: gl.constexpr):
    """Allocate room for what `_find_rows` finds."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_at = gl.allocate_shared_memory(gl.int64, [M], FLAT)
    d_out_at = gl.allocate_shared_memory(gl.int64, [M], FLAT)
    statistic_at = gl.allocate_shared_memory(gl.int64, [M], FLAT)
    return q_at, d_out_at, statistic_at


@gluon.jit
def _find_rows(addresses, pair_M, q, d_out, head_rows, first_query_head, HEADS: gl.constexpr, GROUP: gl.constexpr,
               PAST: gl.constexpr):  # fmt: skip
    """Work out where the queries, output gradients and statistics of M pairs are, once for all who will copy them."""
    token_M, member_M = row_of(pair_M, head_rows, GROUP, PAST)
    addresses[0].store(vectors_to(q, token_M, member_M))
    addresses[1].store(vectors_to(d_out, token_M, member_M))
    addresses[2].store((token_M * HEADS + first_query_head + member_M) * STATISTICS)


@gluon.jit
def _copy_found_rows(rows_smem, stage, addresses, first, q_base, d_out_base, statistics_ptr, M: gl.constexpr,
                     D: gl.constexpr, ROW: gl.constexpr):  # fmt: skip
    """Begin the copies of these rows into buffer `stage`.

    Rows before `first` are before the list and repeat its first pair. Their dO and delta are zeros, and so is what
    they add to dV and dK.
    """
    FLAT: gl.constexpr = flat_layout(gl.num_warps())
    q_smem, d_out_smem, lse_smem, delta_smem = rows_smem
    q_at, d_out_at, statistic_at = addresses
    exist = gl.arange(0, M, gl.SliceLayout(1, ROW)) >= first
    copy_rows(q_smem.index(stage), q_base, q_at.load(gl.SliceLayout(1, ROW)) * VECTOR, D, ROW)
    copy_rows(d_out_smem.index(stage), d_out_base, d_out_at.load(gl.SliceLayout(1, ROW)) * VECTOR, D, ROW, exist)
    statistic = statistics_ptr + statistic_at.load(FLAT)
    copy_to_shared(lse_smem.index(stage), statistic)
    copy_to_shared(delta_smem.index(stage), statistic + 1, gl.arange(0, M, FLAT) >= first)


@gluon.jit
def _own_row(begin, block_keys, shift, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Number a tile's queries within the block; absent ones repeat a readable one, and are masked later."""
    m = begin + gl.arange(0, M, LAYOUT)
    return (gl.minimum(gl.maximum(m, -shift), block_keys - 1) + shift).to(gl.int64)


@gluon.jit
def _copy_own_rows(rows_smem, stage, head, begin, block_keys, shift, query_begin, flat, first_query_head, q, q_base,
                   d_out, d_out_base, statistics_ptr, HEADS: gl.constexpr, M: gl.constexpr, D: gl.constexpr,
                   ROW: gl.constexpr):  # fmt: skip
    """Begin the copies of the block's own queries from number `begin` on, in a head of the group."""
    member = gl.cast(head, gl.int64)
    token_M = query_begin + _own_row(begin, block_keys, shift, M, gl.SliceLayout(1, ROW))
    flat_M = flat + _own_row(begin, block_keys, shift, M, flat_layout(gl.num_warps()))
    _copy_queries(
        rows_smem, stage, q_base, token_M * q.token + member * q.head,
        d_out_base, token_M * d_out.token + member * d_out.head,
        statistics_ptr, flat_M * HEADS + first_query_head + member, D, ROW,
    )  # fmt: skip


@gluon.jit
def _next_tile(head, begin, first, block_keys, M: gl.constexpr):
    """Return head and first query of the next tile: a head's tiles from `first` to `block_keys`, head after head."""
    at_end = begin + M >= block_keys
    return gl.where(at_end, head + 1, head), gl.where(at_end, first, begin + M)


@gluon.jit
def _begin_product(a_smem, b, S_NM: gl.constexpr):
    """Begin S = K q or dP = V dO, `[N, M]`."""
    N: gl.constexpr = a_smem.shape[0]
    M: gl.constexpr = b.shape[0]
    zero_NM = gl.zeros([N, M], gl.float32, S_NM)
    return warpgroup_mma(a_smem, b.permute((1, 0)), zero_NM, use_acc=False, is_async=True)


@gluon.jit
def _begin_values(s_NM, dp_NM, lse_M, delta_smem, d_out, dv_ND, scale_log2, S_NM: gl.constexpr, DK_ND: gl.constexpr):
    """Begin dV += P dO, with S there and dP under way; return dS in 16 bits meanwhile."""
    DTYPE: gl.constexpr = d_out.dtype
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DK_ND, 2)
    p_NM = gl.exp2(s_NM * scale_log2 - lse_M[None, :])
    dv_ND = warpgroup_mma(gl.convert_layout(p_NM.to(DTYPE), OPERAND), d_out, dv_ND, is_async=True)
    delta_M = delta_smem.load(gl.SliceLayout(0, S_NM))
    dp_NM = warpgroup_mma_wait(1, [dp_NM])
    return (p_NM * (dp_NM - delta_M[None, :])).to(DTYPE), dv_ND


@gluon.jit
def _begin_keys(ds_NM, q, dk_ND, DK_ND: gl.constexpr):
    """Begin dK += dS q."""
    return warpgroup_mma(gl.convert_layout(ds_NM, gl.DotOperandLayout(0, DK_ND, 2)), q, dk_ND, is_async=True)


@gluon.jit
def _store_shares(partial_dq_ptr, dq_smem, at_M, WIDTH: gl.constexpr, D: gl.constexpr, ROW: gl.constexpr):
    d = gl.arange(0, D, gl.SliceLayout(0, ROW))
    at_MD = at_M[:, None] * WIDTH + d[None, :]
    gl.store(partial_dq_ptr + at_MD, dq_smem.load(ROW), cache_modifier=".cs")  # the queries should stay in the cache


@gluon.jit(
    repr=called("hopper_key_gradients"),
    do_not_specialize=["first_head"],
)
def key_gradients(
    d_out, q, k, v, statistics_ptr, partials, shares_ptr, lists, offsets_ptr, call, first_head, all_pairs, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PAST: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr,
    SHARES: gl.constexpr, SEGMENT: gl.constexpr, FUSED: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Work N keys of a block against an item's rows: partial dK / scale and dV, and the pairs' dQ if FUSED."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    ROW: gl.constexpr = row_layout(D, WARPS)
    S_NM: gl.constexpr = product_layout(M, WARPS, 1)
    DK_ND: gl.constexpr = product_layout(D, WARPS, 1)
    DQ_MD: gl.constexpr = product_layout(D * M // (16 * WARPS), M // 16, WARPS * 16 // M)
    LANE: gl.constexpr = lane_layout(M, WARPS)
    # The pieces of a block run side by side: they read the same rows.
    pieces = call.block_size // N
    piece = gl.program_id(0) % pieces
    program = gl.program_id(0) // pieces
    item, list_id, begin, end = item_bounds(lists.items, offsets_ptr, program, call.block_slots, SEGMENT)
    if begin >= end:
        return
    head, sequence, key_begin = block_of_list(list_id, call, PACKED)
    kv_head = first_head + head
    wide_head = kv_head.to(gl.int64)
    q_base = query_base(q, kv_head, sequence, call, GROUP, PACKED)
    d_out_base = query_base(d_out, kv_head, sequence, call, GROUP, PACKED)
    head_rows = head * call.rows

    # Before the loop: keys and values, which stay, and STAGES - 1 tiles of rows, a group of copies per tile. Pairs are
    # copied as far ahead again, since finding a row needs its pair.
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    k_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    rows_smem = _allocate_rows(DTYPE, STAGES, M, D)
    ds_smem = gl.allocate_shared_memory(DTYPE, [N, M], gl.NVMMASharedLayout.get_default_for([N, M], DTYPE))
    dq_smem = gl.allocate_shared_memory(DTYPE, [M, D], gl.NVMMASharedLayout.get_default_for([M, D], DTYPE))
    ring = allocate_ring(8, M)
    addresses = _allocate_addresses(M)
    gl.static_assert(2 * STAGES <= 8)  # from the tile whose dQ is stored to the one whose pairs are copied
    m = gl.arange(0, M, gl.SliceLayout(1, ROW))
    key = (key_begin + piece * N + gl.arange(0, N, gl.SliceLayout(1, ROW))).to(gl.int64)
    copy_rows(k_smem, head_base(k, sequence, kv_head), key * k.token, D, ROW)
    copy_rows(v_smem, head_base(v, sequence, kv_head), key * v.token, D, ROW)
    # The ring is eight tiles long, so that a pair is still there when its dQ is stored.
    for early in gl.static_range(2 * STAGES - 2):
        copy_pairs(ring, early, lists.pairs, begin, end)
    for early in gl.static_range(STAGES - 1):
        pair = pairs_of(lists.pairs, early, begin, end, M, LANE)
        _find_rows(addresses, pair, q, d_out, head_rows, wide_head * GROUP, HEADS, GROUP, PAST)
        first = begin - end + (early + 1) * M
        _copy_found_rows(rows_smem, early, addresses, first, q_base, d_out_base, statistics_ptr, M, D, ROW)
        async_copy.commit_group()
    dk = gl.zeros([N, D], gl.float32, DK_ND)
    dv = gl.zeros([N, D], gl.float32, DK_ND)
    tiles = gl.cdiv(end - begin, M)
    async_copy.wait_group(STAGES - 2)
    stage = 0
    for tile in range(0, tiles):
        next_stage, late_stage = stages_around(stage, STAGES)
        q_MD = rows_smem[0].index(stage)
        d_out_MD = rows_smem[1].index(stage)
        # S and dP, both needed at once; dP goes on while S becomes P.
        s = _begin_product(k_smem, q_MD, S_NM)
        dp = _begin_product(v_smem, d_out_MD, S_NM)
        # For the copies of this iteration, after the barrier.
        pair = pairs_in(ring, tile + STAGES - 1, LANE)
        _find_rows(addresses, pair, q, d_out, head_rows, wide_head * GROUP, HEADS, GROUP, PAST)
        # dQ of the tile before leaves for memory beside them: its buffer is written again after the barrier.
        if FUSED and tile > 0:
            share = pairs_in(ring, tile - 1, gl.SliceLayout(1, ROW)).to(gl.int64) * SHARES + piece
            _store_shares(shares_ptr, dq_smem, share, WIDTH, D, ROW)
        lse = rows_smem[2].index(stage).load(gl.SliceLayout(0, S_NM))
        s = warpgroup_mma_wait(1, [s])
        ds, dv = _begin_values(s, dp, lse, rows_smem[3].index(stage), d_out_MD, dv, scale * LOG2E, S_NM, DK_ND)
        if FUSED:
            ds_smem.store(ds)
            # The fence waits for the copies under way, too: later ones begin after it.
            fence_async_shared()
        # All warps have stored dS and addresses, and have read the buffers that are filled next.
        thread_barrier()
        if FUSED:
            zero_MD = gl.zeros([M, D], gl.float32, DQ_MD)
            dq = warpgroup_mma(ds_smem.permute((1, 0)), k_smem, zero_MD, use_acc=False, is_async=True)
        dk = _begin_keys(ds, q_MD, dk, DK_ND)
        # Beside dQ and dK: the rows of STAGES - 1 tiles on. Only dQ is waited for before it is stored.
        if tile + STAGES - 1 < tiles:
            first = begin - end + (tile + STAGES) * M
            _copy_found_rows(rows_smem, late_stage, addresses, first, q_base, d_out_base, statistics_ptr, M, D, ROW)
            copy_pairs(ring, tile + 2 * STAGES - 2, lists.pairs, begin, end)
        async_copy.commit_group()
        if FUSED:
            dq = warpgroup_mma_wait(1, [dq])
            dq_smem.store(dq.to(DTYPE))
        dk, dv = warpgroup_mma_wait(0, [dk, dv])
        async_copy.wait_group(STAGES - 2)
        stage = next_stage
    # dQ of the list's first rows, the last tile: places before the list go to a row that nobody reads.
    if FUSED:
        nowhere = gl.cast(all_pairs, gl.int64) * SHARES
        share = pairs_in(ring, tiles - 1, gl.SliceLayout(1, ROW)).to(gl.int64) * SHARES + piece
        share = gl.where(end - tiles * M + m >= begin, share, nowhere)
        _store_shares(shares_ptr, dq_smem, share, WIDTH, D, ROW)
    # In fp32 and by item: the own block's kernel sums them in list order, whichever program was done first.
    n = piece * N + gl.arange(0, N, gl.SliceLayout(1, DK_ND))
    d = gl.arange(0, D, gl.SliceLayout(0, DK_ND))
    at_ND = (item.to(gl.int64) * call.block_size + n)[:, None] * WIDTH + d[None, :]
    gl.store(partials.dk + at_ND, dk)
    gl.store(partials.dv + at_ND, dv)


@gluon.jit
def _longest_first(call, pieces, together):
    """Return the block slot and piece of a program.

    A block's first keys have all its rows, its last ones few. In `together` blocks all first pieces come first, then
    all second ones, so that the multiprocessors finish together.
    """
    first_block_slot = gl.program_id(0) // (together * pieces) * together
    place = gl.program_id(0) - first_block_slot * pieces
    here = gl.minimum(together, call.block_slots - first_block_slot)
    return first_block_slot + place % here, place // here


@gluon.jit(
    repr=called("hopper_own_key_gradients"),
    do_not_specialize=["first_head"],
)
def own_key_gradients(
    d_out, q, k, v, statistics_ptr, partials, gradients, offsets_ptr, call, first_head, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PAST: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr,
    SHARES: gl.constexpr, SEGMENT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Go through the own queries of N keys of a block, add the partials of its items, write dK and dV."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    ROW: gl.constexpr = row_layout(D, WARPS)
    S_NM: gl.constexpr = product_layout(M, WARPS, 1)
    DK_ND: gl.constexpr = product_layout(D, WARPS, 1)
    block_size = call.block_size
    block_slot, piece = _longest_first(call, block_size // N, gl.maximum(_ROWS_TOGETHER // (block_size * GROUP), 1))
    start = piece * N
    head = gl.program_id(1)
    # The rows that read these keys: from their own number on, in every head of the group, none before the first query.
    sequence, _, key_begin, block_keys, query_begin, shift = own_rows(block_slot, call, PACKED)
    if start >= block_keys:
        return
    kv_head = first_head + head
    wide_head = kv_head.to(gl.int64)
    q_base = head_base(q, sequence, wide_head * GROUP)
    d_out_base = head_base(d_out, sequence, wide_head * GROUP)
    flat = first_row(sequence, call, PACKED)
    first_own = gl.maximum(start, -shift)
    first = first_own // M * M
    tiles_per_head = gl.cdiv(gl.maximum(block_keys - first, 0), M)
    # Where no query of the sequence lies in the block there is no row to repeat, and none is copied.
    tiles = gl.where(first_own < block_keys, tiles_per_head * GROUP, 0)

    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    k_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    rows_smem = _allocate_rows(DTYPE, STAGES, M, D)
    # Absent keys repeat the last one; nothing is stored for them.
    key = key_begin + gl.minimum(start + gl.arange(0, N, gl.SliceLayout(1, ROW)), block_keys - 1)
    key = key.to(gl.int64)
    copy_rows(k_smem, head_base(k, sequence, kv_head), key * k.token, D, ROW)
    copy_rows(v_smem, head_base(v, sequence, kv_head), key * v.token, D, ROW)
    # The block's own queries, one head of the group after the other, STAGES - 1 tiles ahead.
    late_head, late_begin = 0, first
    for early in gl.static_range(STAGES - 1):
        if early < tiles:
            _copy_own_rows(
                rows_smem, early, late_head, late_begin, block_keys, shift, query_begin, flat, wide_head * GROUP, q,
                q_base, d_out, d_out_base, statistics_ptr, HEADS, M, D, ROW,
            )  # fmt: skip
        late_head, late_begin = _next_tile(late_head, late_begin, first, block_keys, M)
        async_copy.commit_group()
    # Sums of all heads of the group in one pair of registers, since they share the keys.
    dk = gl.zeros([N, D], gl.float32, DK_ND)
    dv = gl.zeros([N, D], gl.float32, DK_ND)
    column = gl.arange(0, M, gl.SliceLayout(0, S_NM))
    row = start + gl.arange(0, N, gl.SliceLayout(1, S_NM))
    async_copy.wait_group(STAGES - 2)
    stage = 0
    begin = first
    for tile in range(0, tiles):
        next_stage, late_stage = stages_around(stage, STAGES)
        q_MD = rows_smem[0].index(stage)
        d_out_MD = rows_smem[1].index(stage)
        # Later rows are copied beside S and dP: the products of the tile before, whose buffer they get, are done.
        s = _begin_product(k_smem, q_MD, S_NM)
        dp = _begin_product(v_smem, d_out_MD, S_NM)
        if tile + STAGES - 1 < tiles:
            _copy_own_rows(
                rows_smem, late_stage, late_head, late_begin, block_keys, shift, query_begin, flat, wide_head * GROUP,
                q, q_base, d_out, d_out_base, statistics_ptr, HEADS, M, D, ROW,
            )  # fmt: skip
        late_head, late_begin = _next_tile(late_head, late_begin, first, block_keys, M)
        async_copy.commit_group()
        # Absent rows have P = 0 by an infinite log-sum-exp: their copies repeat a present row.
        m = begin + column
        lse = rows_smem[2].index(stage).load(gl.SliceLayout(0, S_NM))
        lse = gl.where((m < block_keys) & (m + shift >= 0), lse, float("inf"))
        s = warpgroup_mma_wait(1, [s])
        if begin < start + N:  # on the diagonal
            s = gl.where(row[:, None] <= m[None, :], s, -float("inf"))
        ds, dv = _begin_values(s, dp, lse, rows_smem[3].index(stage), d_out_MD, dv, scale * LOG2E, S_NM, DK_ND)
        dk = _begin_keys(ds, q_MD, dk, DK_ND)
        dk, dv = warpgroup_mma_wait(0, [dk, dv])
        async_copy.wait_group(STAGES - 2)
        _, begin = _next_tile(0, begin, first, block_keys, M)
        stage = next_stage
    # The past's partials are added in list order, after the loop: always the same order, and no registers during it.
    list_begin, list_end, item = 0, 0, 0
    if offsets_ptr is not None:
        list_id = head * call.block_slots + block_slot
        list_begin, list_end = list_bounds(offsets_ptr, list_id, call.block_slots)
        item = list_begin // SEGMENT + list_id
    n = start + gl.arange(0, N, gl.SliceLayout(1, DK_ND))
    d = gl.arange(0, D, gl.SliceLayout(0, DK_ND))
    exists = (n < block_keys)[:, None]
    for partial in range(gl.cdiv(list_end - list_begin, SEGMENT)):
        at_ND = (gl.cast(item + partial, gl.int64) * block_size + n)[:, None] * WIDTH + d[None, :]
        dk += gl.load(partials.dk + at_ND, mask=exists, other=0.0)
        dv += gl.load(partials.dv + at_ND, mask=exists, other=0.0)
    key_row = key_begin + n
    if not PACKED:
        key_row += sequence * call.tokens_k
    at_ND = (key_row.to(gl.int64)[:, None] * (HEADS // GROUP) + kv_head) * WIDTH + d[None, :]
    gl.store(gradients.dk + at_ND, (dk * scale).to(DTYPE), mask=exists)
    gl.store(gradients.dv + at_ND, dv.to(DTYPE), mask=exists)
