"""A tile of a block's own queries against their block, on Hopper: the portable `attend_own`, and its dQ.

The M queries stay in shared memory and the block's keys stream by, N at a time. What the past contributed is added at
the end, in the layout in which rows are written to memory: it is read once, straight into registers. The tiles are
small enough for three programs on a multiprocessor: while one reads, another multiplies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import first_row
from openmoba.ops.triton.hopper.tiles import copy_rows, product_layout, row_layout
from openmoba.ops.triton.rows import LOG2E, STATISTICS, head_base, own_rows
from openmoba.ops.triton.table import key_row


@gluon.constexpr_function
def _rank_layout(ranks, warps):
    """Lay out rows of `ranks` numbers, or of as many as a warp has lanes: one number per lane."""
    lanes = min(32, 1 << max(0, ranks - 1).bit_length())
    return gl.BlockedLayout([1, 1], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _copy_keys(smem, base, begin, block_keys, token_stride, N: gl.constexpr, D: gl.constexpr, ROW: gl.constexpr):
    """Begin to copy keys or values from number `begin` of the block on; absent ones repeat the last."""
    n = gl.minimum(begin + gl.arange(0, N, gl.SliceLayout(1, ROW)), block_keys - 1)
    copy_rows(smem, base, n.to(gl.int64) * token_stride, D, ROW)


@gluon.jit
def _readable(start, low, high, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Number a tile's rows in the block; those outside `[low, high)` repeat one inside, and are not stored."""
    return gl.minimum(gl.maximum(start + gl.arange(0, M, LAYOUT), low), high - 1)


@gluon.jit
def _exist(start, low, high, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Say which of a tile's rows are in `[low, high)`."""
    m = start + gl.arange(0, M, LAYOUT)
    return (m >= low) & (m < high)


@gluon.jit(
    repr=called("hopper_attend_own"),
    do_not_specialize=["first_head", "first_block_slot", "first_token", "end_token"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def attend_own(
    q, k, v, partials, counts_ptr, results, call, table, first_head, first_block_slot, first_token, end_token, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PAST: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr,
    SPLIT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Attend M queries of a head to their own block causally, merge the partials, write output and LSE."""
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    ROW: gl.constexpr = row_layout(D, WARPS)
    S_MN: gl.constexpr = product_layout(N, WARPS, 1)
    O_MD: gl.constexpr = product_layout(D, WARPS, 1)
    tiles = call.block_size // M
    block_slot = first_block_slot + gl.program_id(0) // tiles
    start = gl.program_id(0) % tiles * M
    sequence, block, key_begin, block_keys, query_begin, shift = own_rows(block_slot, call, PACKED)
    # Rows of the tile: of the block, of the sequence, of the range of tokens. In an order that the assembler gets
    # right, see the portable `attend_own`.
    first_query = first_row(sequence, call, PACKED)
    first_flat = first_query + shift
    low = gl.maximum(start, gl.maximum(first_token, first_query) - first_flat)
    high = gl.minimum(gl.minimum(start + M, block_keys), end_token - first_flat)
    if low >= high:
        return
    head = gl.program_id(1) // GROUP
    member = gl.program_id(1) % GROUP
    kv_head = first_head + head
    head_index = kv_head * GROUP + member
    q_base = head_base(q, sequence, head_index)
    batch_row, key_begin = key_row(sequence, key_begin, call, table, SPLIT)
    k_base = head_base(k, batch_row, kv_head) + gl.cast(key_begin, gl.int64) * k.token
    v_base = head_base(v, batch_row, kv_head) + gl.cast(key_begin, gl.int64) * v.token

    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    q_smem = gl.allocate_shared_memory(DTYPE, [M, D], gl.NVMMASharedLayout.get_default_for([M, D], DTYPE))
    k_smem = gl.allocate_shared_memory(DTYPE, [2, N, D], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    # Two groups of copies before the loop: queries and the first keys; the first values.
    readable = _readable(start, low, high, M, gl.SliceLayout(1, ROW))
    copy_rows(q_smem, q_base, (query_begin + readable + shift).to(gl.int64) * q.token, D, ROW)
    _copy_keys(k_smem.index(0), k_base, 0, block_keys, k.token, N, D, ROW)
    async_copy.commit_group()
    _copy_keys(v_smem, v_base, 0, block_keys, v.token, N, D, ROW)
    async_copy.commit_group()

    # The online softmax, in the layout of the products, so that nothing crosses threads but a row's maximum and sum.
    m = start + gl.arange(0, M, gl.SliceLayout(1, S_MN))
    n = gl.arange(0, N, gl.SliceLayout(0, S_MN))
    zero_MN = gl.zeros([M, N], gl.float32, S_MN)
    m_M = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(1, S_MN))
    l_M = gl.zeros([M], gl.float32, gl.SliceLayout(1, S_MN))
    o = gl.zeros([M, D], gl.float32, O_MD)
    pieces = gl.cdiv(gl.minimum(start + M, block_keys), N)
    for piece in range(0, pieces):
        async_copy.wait_group(1)  # for the keys; the values may still be on their way
        s = warpgroup_mma(q_smem, k_smem.index(piece % 2).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
        if piece + 1 < pieces:
            _copy_keys(k_smem.index((piece + 1) % 2), k_base, (piece + 1) * N, block_keys, k.token, N, D, ROW)
        async_copy.commit_group()
        s = warpgroup_mma_wait(0, [s])
        if (piece + 1) * N > start:  # on the diagonal; the pieces before it are read by all rows, without a mask
            s = gl.where((piece * N + n)[None, :] <= m[:, None], s, -float("inf"))
        m_new_M = gl.maximum(m_M, gl.max(s, 1) * (scale * LOG2E))
        alpha_M = gl.exp2(m_M - m_new_M)
        p = gl.exp2(s * (scale * LOG2E) - m_new_M[:, None])
        l_M = l_M * alpha_M + gl.sum(p, 1)
        m_M = m_new_M
        p = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, O_MD, 2))
        o = o * gl.convert_layout(alpha_M, gl.SliceLayout(1, O_MD))[:, None]
        async_copy.wait_group(1)  # for the values; the next keys may still be on their way
        o = warpgroup_mma(p, v_smem, o, is_async=True)
        o = warpgroup_mma_wait(0, [o])
        if piece + 1 < pieces:
            _copy_keys(v_smem, v_base, (piece + 1) * N, block_keys, v.token, N, D, ROW)
        async_copy.commit_group()

    # Past and own block are merged in the layout in which rows lie in memory: partials go straight to registers.
    own_M = gl.convert_layout(m_M + gl.log2(l_M), gl.SliceLayout(1, ROW))
    o = gl.convert_layout(o * gl.convert_layout(1.0 / l_M, gl.SliceLayout(1, O_MD))[:, None], ROW)
    flat = (first_flat + readable).to(gl.int64)
    first_pair = (gl.cast(head, gl.int64) * call.rows + (flat - first_token) * GROUP + member) * PAST
    past = gl.minimum(block, PAST)
    count_M = None  # all rows have as many past blocks as their block has before it, up to PAST
    if counts_ptr is not None:
        count_M = gl.load(counts_ptr + gl.cast(head, gl.int64) * call.rows + flat * GROUP + member)
    top_M, l_M = _weigh(partials.lse, first_pair, past, count_M, own_M, PAST, ROW)
    d = gl.arange(0, D, gl.SliceLayout(0, ROW))
    o = o * gl.exp2(own_M - top_M)[:, None]
    for rank in range(0, past):
        reads_M = None if count_M is None else rank < count_M
        weight_M = gl.exp2(_load(partials.lse + first_pair + rank, reads_M, -float("inf"), "") - top_M)
        at_MD = (first_pair + rank)[:, None] * WIDTH + d[None, :]
        reads_MD = None if count_M is None else (rank < count_M)[:, None] & (d >= 0)[None, :]
        partial = _load(partials.out + at_MD, reads_MD, 0.0, "evict_first")
        o += partial.to(gl.float32) * weight_M[:, None]
    exists = _exist(start, low, high, M, gl.SliceLayout(1, ROW))
    o = (o * (1.0 / l_M)[:, None]).to(DTYPE)
    at_M = flat * HEADS + head_index
    gl.store(results.out + at_M[:, None] * WIDTH + d[None, :], o, mask=exists[:, None] & (d >= 0)[None, :])
    gl.store(results.lse + at_M, (top_M + gl.log2(l_M)) / LOG2E, mask=exists)


@gluon.jit
def _load(pointers, mask, absent: gl.constexpr, eviction: gl.constexpr):
    """Load what is there, and `absent` where the mask, unless it is None, says that nothing is."""
    if mask is None:
        return gl.load(pointers, eviction_policy=eviction)
    else:
        return gl.load(pointers, mask=mask, other=absent, eviction_policy=eviction)


@gluon.jit
def _weigh(partial_lse_ptr, pair_M, past, count_M, own_M, PAST: gl.constexpr, ROW: gl.constexpr):
    """Return the largest log-sum-exp of the own block and a row's partials, and the sum of all in units of that."""
    RANKS: gl.constexpr = _rank_layout(PAST, gl.num_warps())
    WIDE: gl.constexpr = RANKS.threads_per_warp[1]
    rank = gl.arange(0, WIDE, gl.SliceLayout(0, RANKS))
    at_M = gl.convert_layout(pair_M, gl.SliceLayout(1, RANKS))
    ranks = past if count_M is None else gl.convert_layout(count_M, gl.SliceLayout(1, RANKS))[:, None]
    top_M = own_M
    for begin in range(0, past, WIDE):
        rank_here = (begin + rank)[None, :]
        lse_MR = gl.load(partial_lse_ptr + at_M[:, None] + rank_here, mask=rank_here < ranks, other=-float("inf"))
        top_M = gl.maximum(top_M, gl.convert_layout(gl.max(lse_MR, 1), gl.SliceLayout(1, ROW)))
    l_M = gl.exp2(own_M - top_M)
    top_here_M = gl.convert_layout(top_M, gl.SliceLayout(1, RANKS))
    for begin in range(0, past, WIDE):
        rank_here = (begin + rank)[None, :]
        lse_MR = gl.load(partial_lse_ptr + at_M[:, None] + rank_here, mask=rank_here < ranks, other=-float("inf"))
        l_M += gl.convert_layout(gl.sum(gl.exp2(lse_MR - top_here_M[:, None]), 1), gl.SliceLayout(1, ROW))
    return top_M, l_M


@gluon.jit(
    repr=called("hopper_own_query_gradients"),
    do_not_specialize=["first_head"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def own_query_gradients(
    d_out, q, k, v, statistics_ptr, shares_ptr, counts_ptr, dq_ptr, call, first_head, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PAST: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr,
    SHARES: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the own block's dQ of M queries of a head, add the pairs' shares, write dQ."""
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    ROW: gl.constexpr = row_layout(D, WARPS)
    S_MN: gl.constexpr = product_layout(N, WARPS, 1)
    DQ_MD: gl.constexpr = product_layout(D, WARPS, 1)
    tiles = call.block_size // M
    block_slot = gl.program_id(0) // tiles
    start = gl.program_id(0) % tiles * M
    sequence, block, key_begin, block_keys, query_begin, shift = own_rows(block_slot, call, PACKED)
    # Absent rows, before the first query or behind the end, repeat a present one: copies need no mask.
    low = gl.maximum(start, -shift)
    high = gl.minimum(start + M, block_keys)
    if low >= high:
        return
    head = gl.program_id(1) // GROUP
    member = gl.program_id(1) % GROUP
    kv_head = first_head + head
    head_index = (kv_head * GROUP + member).to(gl.int64)
    q_base = head_base(q, sequence, head_index)
    d_out_base = head_base(d_out, sequence, head_index)
    k_base = head_base(k, sequence, kv_head) + gl.cast(key_begin, gl.int64) * k.token
    v_base = head_base(v, sequence, kv_head) + gl.cast(key_begin, gl.int64) * v.token

    # The M queries stay; STAGES pieces of keys and values are on their way at once.
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], DTYPE)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    q_smem = gl.allocate_shared_memory(DTYPE, [M, D], ROWS)
    d_out_smem = gl.allocate_shared_memory(DTYPE, [M, D], ROWS)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], KEYS)
    readable = _readable(start, low, high, M, gl.SliceLayout(1, ROW))
    token = (query_begin + readable + shift).to(gl.int64)
    copy_rows(q_smem, q_base, token * q.token, D, ROW)
    copy_rows(d_out_smem, d_out_base, token * d_out.token, D, ROW)
    # One group of copies per piece of keys and values, STAGES of them ahead; the queries are in the first.
    pieces = gl.cdiv(high, N)
    for early in gl.static_range(STAGES):
        if early < pieces:
            _copy_keys(k_smem.index(early), k_base, early * N, block_keys, k.token, N, D, ROW)
            _copy_keys(v_smem.index(early), v_base, early * N, block_keys, v.token, N, D, ROW)
        async_copy.commit_group()

    m = start + gl.arange(0, M, gl.SliceLayout(1, S_MN))
    n = gl.arange(0, N, gl.SliceLayout(0, S_MN))
    # Statistics go straight to registers: each thread has those of its rows of S and dP.
    first_flat = first_row(sequence, call, PACKED) + shift
    flat_M = (first_flat + _readable(start, low, high, M, gl.SliceLayout(1, S_MN))).to(gl.int64)
    statistic = statistics_ptr + (flat_M * HEADS + head_index) * STATISTICS
    lse_M = gl.load(statistic)
    delta_M = gl.load(statistic + 1)
    zero_MN = gl.zeros([M, N], gl.float32, S_MN)
    dq = gl.zeros([M, D], gl.float32, DQ_MD)
    for piece in range(0, pieces):
        async_copy.wait_group(STAGES - 1)
        k_ND = k_smem.index(piece % STAGES)
        s = warpgroup_mma(q_smem, k_ND.permute((1, 0)), zero_MN, use_acc=False, is_async=True)
        dp = warpgroup_mma(
            d_out_smem, v_smem.index(piece % STAGES).permute((1, 0)), zero_MN, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(1, [s])  # dP goes on while S becomes P
        if (piece + 1) * N > start:
            s = gl.where((piece * N + n)[None, :] <= m[:, None], s, -float("inf"))
        p = gl.exp2(s * (scale * LOG2E) - lse_M[:, None])
        dp = warpgroup_mma_wait(0, [dp])
        ds = (p * (dp - delta_M[:, None])).to(DTYPE)
        dq = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, DQ_MD, 2)), k_ND, dq, is_async=True)
        dq = warpgroup_mma_wait(0, [dq])
        # dQ has read this piece's keys: its buffers are free.
        later = piece + STAGES
        if later < pieces:
            _copy_keys(k_smem.index(piece % STAGES), k_base, later * N, block_keys, k.token, N, D, ROW)
            _copy_keys(v_smem.index(piece % STAGES), v_base, later * N, block_keys, v.token, N, D, ROW)
        async_copy.commit_group()

    # The pairs' shares are added last, in rank order, in the layout in which they lie in memory.
    dq = gl.convert_layout(dq, ROW)
    flat = (first_flat + readable).to(gl.int64)
    first_pair = (gl.cast(head, gl.int64) * call.rows + flat * GROUP + member) * PAST
    d = gl.arange(0, D, gl.SliceLayout(0, ROW))
    share = shares_ptr + (first_pair * SHARES * WIDTH)[:, None] + d[None, :]
    count_M = None  # all rows have as many past blocks as their block has before it, up to PAST
    if counts_ptr is not None:
        count_M = gl.load(counts_ptr + gl.cast(head, gl.int64) * call.rows + flat * GROUP + member)
    for rank in range(0, gl.minimum(block, PAST)):
        reads_MD = None if count_M is None else (rank < count_M)[:, None] & (d >= 0)[None, :]
        for its_piece in gl.static_range(SHARES):
            dq += _load(share + its_piece * WIDTH, reads_MD, 0.0, "evict_first").to(gl.float32)
        share += SHARES * WIDTH
    exists = _exist(start, low, high, M, gl.SliceLayout(1, ROW))
    at_MD = ((flat * HEADS + head_index) * WIDTH)[:, None] + d[None, :]
    gl.store(dq_ptr + at_MD, (dq * scale).to(DTYPE), mask=exists[:, None] & (d >= 0)[None, :])
