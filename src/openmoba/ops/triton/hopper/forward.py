"""Past blocks, forward, on Hopper: the portable `attend_past` with copies and matrix products in flight.

M rows and N keys per tile, D head width. Two programs of four warps or more share a multiprocessor: while one
exponentiates, the other multiplies.

`attend_past_resident` keeps a block's N keys and values in shared memory and lets its rows stream by, STAGES tiles of
them in flight; S of the next tile is computed while S of this one is exponentiated. `attend_past_streaming` keeps M
rows and lets keys and values stream by, without a break between one tile of rows and the next: M is as large as the
registers allow, for every tile of rows reads the whole block from the L2 cache.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import query_base
from openmoba.ops.triton.hopper.tiles import (
    VECTOR,
    allocate_ring,
    copy_pairs,
    copy_rows,
    lane_layout,
    pairs_in,
    pairs_of,
    product_layout,
    row_layout,
    row_of,
    stages_around,
    vectors_to,
)
from openmoba.ops.triton.plan import block_of_list, item_bounds, skipped
from openmoba.ops.triton.rows import LOG2E, head_base
from openmoba.ops.triton.table import key_row


@gluon.jit
def _copy_queries(smem, pair_M, q, q_base, head_rows, GROUP: gl.constexpr, PAST: gl.constexpr, D: gl.constexpr,
                  ROW: gl.constexpr):  # fmt: skip
    token_M, member_M = row_of(pair_M, head_rows, GROUP, PAST)
    copy_rows(smem, q_base, token_M * q.token + member_M * q.head, D, ROW)


@gluon.jit
def _store_partials(out_ptr, lse_ptr, smem, ring, tile, o_MD, m_M, l_M, WIDTH: gl.constexpr,
                    D: gl.constexpr, ROW: gl.constexpr, S_MN: gl.constexpr, O_MD: gl.constexpr):  # fmt: skip
    """Store output and log-sum-exp of a tile's pairs; the output goes through `smem`, its queries' buffer."""
    smem.store((o_MD * gl.convert_layout(1.0 / l_M, gl.SliceLayout(1, O_MD))[:, None]).to(smem.dtype))
    gl.store(lse_ptr + pairs_in(ring, tile, gl.SliceLayout(1, S_MN)), m_M + gl.log2(l_M))
    d = gl.arange(0, D, gl.SliceLayout(0, ROW))
    at_MD = pairs_in(ring, tile, gl.SliceLayout(1, ROW)).to(gl.int64)[:, None] * WIDTH + d[None, :]
    gl.store(out_ptr + at_MD, smem.load(ROW), cache_modifier=".cs")  # the queries should stay in the cache


@gluon.jit(
    repr=called("hopper_attend_past_resident"),
    do_not_specialize=["first_head", "first_pair"],
    do_not_specialize_on_alignment=["offsets_ptr", "skips_ptr"],
)
def attend_past_resident(
    q, k, v, partials, lists, offsets_ptr, skips_ptr, call, table, first_head, first_pair, scale,
    GROUP: gl.constexpr, PAST: gl.constexpr, WIDTH: gl.constexpr, SEGMENT: gl.constexpr, PACKED: gl.constexpr,
    SPLIT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend the rows of one item, which chose a block, to the N keys of that block."""
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    ROW: gl.constexpr = row_layout(D, gl.num_warps())
    LANE: gl.constexpr = lane_layout(M, gl.num_warps())
    S_MN: gl.constexpr = product_layout(N, gl.num_warps(), 1)
    O_MD: gl.constexpr = product_layout(D, gl.num_warps(), 1)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O_MD, 2)
    _, list_id, begin, end = item_bounds(lists.items, offsets_ptr, gl.program_id(0), call.block_slots, SEGMENT)
    if begin >= end:
        return
    begin, end = skipped(begin, end, list_id, skips_ptr)
    out_ptr = partials.out - gl.cast(first_pair, gl.int64) * WIDTH
    lse_ptr = partials.lse - first_pair
    head, sequence, key_begin = block_of_list(list_id, call, PACKED)
    kv_head = first_head + head
    q_base = query_base(q, kv_head, sequence, call, GROUP, PACKED)
    batch_row, key_begin = key_row(sequence, key_begin, call, table, SPLIT)
    head_rows = head * call.rows

    # Before the loop: the block, and the first STAGES tiles of queries, one group of copies per tile. The block is in
    # the first group, which is the first to be waited for.
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    k_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, M, D], gl.NVMMASharedLayout.get_default_for([M, D], DTYPE))
    address_smem = gl.allocate_shared_memory(gl.int64, [M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring = allocate_ring(1, M)
    key = (key_begin + gl.arange(0, N, gl.SliceLayout(1, ROW))).to(gl.int64)
    copy_rows(k_smem, head_base(k, batch_row, kv_head), key * k.token, D, ROW)
    copy_rows(v_smem, head_base(v, batch_row, kv_head), key * v.token, D, ROW)
    for early in gl.static_range(STAGES):
        early_pair = pairs_of(lists.pairs, early, begin, end, M, gl.SliceLayout(1, ROW))
        _copy_queries(q_smem.index(early), early_pair, q, q_base, head_rows, GROUP, PAST, D, ROW)
        async_copy.commit_group()
    zero_MN = gl.zeros([M, N], gl.float32, S_MN)
    zero_MD = gl.zeros([M, D], gl.float32, O_MD)
    tiles = gl.cdiv(end - begin, M)
    # S of the first tile, which needs the oldest group alone; every tile finds its S done by the tile before.
    async_copy.wait_group(STAGES - 1)
    s = warpgroup_mma(q_smem.index(0), k_smem.permute((1, 0)), zero_MN, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    async_copy.wait_group(STAGES - 2)
    stage = 0
    late = pairs_of(lists.pairs, STAGES, begin, end, M, LANE)
    for tile in range(0, tiles):
        next_stage, _ = stages_around(stage, STAGES)
        # S of the next tile runs while this tile is exponentiated.
        s_next = warpgroup_mma(q_smem.index(next_stage), k_smem.permute((1, 0)), zero_MN, use_acc=False, is_async=True)
        # A pair is loaded by one lane, which works out for all where its query is.
        pair = pairs_of(lists.pairs, tile, begin, end, M, LANE)
        next_late = pairs_of(lists.pairs, tile + STAGES + 1, begin, end, M, LANE)
        s = warpgroup_mma_wait(1, [s])  # waits for nothing, but keeps what follows behind the product's start
        m_M = gl.max(s, 1) * (scale * LOG2E)
        p = gl.exp2(s * (scale * LOG2E) - m_M[:, None])
        l_M = gl.sum(p, 1)
        o = warpgroup_mma(gl.convert_layout(p.to(DTYPE), OPERAND), v_smem, zero_MD, use_acc=False, is_async=True)
        # While P V and S run: where the queries are that this tile's buffer gets next.
        token, member = row_of(late, head_rows, GROUP, PAST)
        address_smem.store(vectors_to(q, token, member))
        ring.index(0).store(pair)
        o, s = warpgroup_mma_wait(0, [o, s_next])
        # The tile's queries are read: their buffer is free, for its output and then for later queries.
        _store_partials(out_ptr, lse_ptr, q_smem.index(stage), ring, tile, o, m_M, l_M, WIDTH, D, ROW, S_MN, O_MD)
        if tile + STAGES < tiles:
            copy_rows(q_smem.index(stage), q_base, address_smem.load(gl.SliceLayout(1, ROW)) * VECTOR, D, ROW)
        # A group in every iteration, empty or not, so that the number waited for never changes.
        async_copy.commit_group()
        async_copy.wait_group(STAGES - 2)
        stage, late = next_stage, next_late


@gluon.jit(
    repr=called("hopper_attend_past_streaming"),
    do_not_specialize=["first_head", "first_pair"],
    do_not_specialize_on_alignment=["offsets_ptr", "skips_ptr"],
)
def attend_past_streaming(
    q, k, v, partials, lists, offsets_ptr, skips_ptr, call, table, first_head, first_pair, scale,
    GROUP: gl.constexpr, PAST: gl.constexpr, WIDTH: gl.constexpr, SEGMENT: gl.constexpr, PACKED: gl.constexpr,
    SPLIT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Attend the rows of one item, which chose a block, to that block: a multiple of N keys, at least 2 N."""
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    ROW: gl.constexpr = row_layout(D, gl.num_warps())
    S_MN: gl.constexpr = product_layout(N, gl.num_warps(), 1)
    O_MD: gl.constexpr = product_layout(D, gl.num_warps(), 1)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O_MD, 2)
    _, list_id, begin, end = item_bounds(lists.items, offsets_ptr, gl.program_id(0), call.block_slots, SEGMENT)
    if begin >= end:
        return
    begin, end = skipped(begin, end, list_id, skips_ptr)
    out_ptr = partials.out - gl.cast(first_pair, gl.int64) * WIDTH
    lse_ptr = partials.lse - first_pair
    head, sequence, key_begin = block_of_list(list_id, call, PACKED)
    kv_head = first_head + head
    q_base = query_base(q, kv_head, sequence, call, GROUP, PACKED)
    batch_row, key_begin = key_row(sequence, key_begin, call, table, SPLIT)
    head_rows = head * call.rows
    # Within a block 32 bits are enough (`why_not`): the loop counts in them.
    first_key = key_begin.to(gl.int64)
    k_base = head_base(k, batch_row, kv_head) + first_key * k.token
    v_base = head_base(v, batch_row, kv_head) + first_key * v.token

    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    k_smem = gl.allocate_shared_memory(DTYPE, [2, N, D], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [N, D], KEYS)
    q_smem = gl.allocate_shared_memory(DTYPE, [2, M, D], gl.NVMMASharedLayout.get_default_for([M, D], DTYPE))
    ring = allocate_ring(2, M)
    n = gl.arange(0, N, gl.SliceLayout(1, ROW))
    pieces = call.block_size // N
    # Two groups of copies before the loop: queries, their pairs and the first keys; the first values.
    pair = pairs_of(lists.pairs, 0, begin, end, M, gl.SliceLayout(1, ROW))
    _copy_queries(q_smem.index(0), pair, q, q_base, head_rows, GROUP, PAST, D, ROW)
    copy_pairs(ring, 0, lists.pairs, begin, end)
    copy_rows(k_smem.index(0), k_base, n * k.token, D, ROW)
    async_copy.commit_group()
    copy_rows(v_smem, v_base, n * v.token, D, ROW)
    async_copy.commit_group()
    zero_MN = gl.zeros([M, N], gl.float32, S_MN)
    turns = gl.cdiv(end - begin, M) * pieces
    m_M = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(1, S_MN))
    l_M = gl.zeros([M], gl.float32, gl.SliceLayout(1, S_MN))
    o = gl.zeros([M, D], gl.float32, O_MD)
    tile, piece = 0, 0
    # One loop over all (tile of rows, piece of the block), so that copies go on from one tile to the next.
    for turn in range(0, turns):
        next_piece = gl.where(piece + 1 == pieces, 0, piece + 1)
        async_copy.wait_group(1)  # for the keys; the values may still be on their way
        s = warpgroup_mma(
            q_smem.index(tile % 2), k_smem.index(turn % 2).permute((1, 0)), zero_MN, use_acc=False, is_async=True
        )
        # Beside S: the next keys. Where they are is worked out anew, since kept it would take registers that spill.
        # A tile's pairs come one piece before its queries, which need them.
        if turn + 1 < turns:
            copy_rows(k_smem.index((turn + 1) % 2), k_base, (next_piece * N + n) * k.token, D, ROW)
            if piece == 0:
                copy_pairs(ring, tile + 1, lists.pairs, begin, end)
            if (piece == 1) & (turn + pieces <= turns):
                pair = pairs_in(ring, tile + 1, gl.SliceLayout(1, ROW))
                _copy_queries(q_smem.index((tile + 1) % 2), pair, q, q_base, head_rows, GROUP, PAST, D, ROW)
        async_copy.commit_group()
        s = warpgroup_mma_wait(0, [s])
        # O is scaled before P V is added to it: the product accumulates in place.
        m_new_M = gl.maximum(m_M, gl.max(s, 1) * (scale * LOG2E))
        alpha_M = gl.exp2(m_M - m_new_M)
        p = gl.exp2(s * (scale * LOG2E) - m_new_M[:, None])
        l_M = l_M * alpha_M + gl.sum(p, 1)
        m_M = m_new_M
        p = gl.convert_layout(p.to(DTYPE), OPERAND)
        o = o * gl.convert_layout(alpha_M, gl.SliceLayout(1, O_MD))[:, None]
        async_copy.wait_group(1)  # for the values; the next keys may still be on their way
        o = warpgroup_mma(p, v_smem, o, is_async=True)
        o = warpgroup_mma_wait(0, [o])
        # The values are read: the next ones come beside the next S.
        if turn + 1 < turns:
            copy_rows(v_smem, v_base, (next_piece * N + n) * v.token, D, ROW)
        async_copy.commit_group()
        # The tile has met the whole block; the next one's first keys are already on their way.
        if next_piece == 0:
            _store_partials(
                out_ptr, lse_ptr, q_smem.index(tile % 2), ring, tile, o, m_M, l_M, WIDTH, D, ROW, S_MN, O_MD
            )
            m_M = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(1, S_MN))
            l_M = gl.zeros([M], gl.float32, gl.SliceLayout(1, S_MN))
            o = gl.zeros([M, D], gl.float32, O_MD)
            tile += 1
        piece = next_piece
