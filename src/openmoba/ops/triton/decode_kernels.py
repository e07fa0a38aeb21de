"""The kernels of decoding: `score` and `attend`, as `openmoba.ops.triton.decode` describes and launches them.

A *query row* r is (query token, query head of one key/value head's group). M query rows, N blocks or keys per tile,
L blocks and P pages looked at at once, C portions merged at once, D head width padded to a power of two (WIDTH is the
real one), of which the scores take W at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from openmoba.ops.triton.family import called
from openmoba.ops.triton.geometry import locate, sequence_of, span
from openmoba.ops.triton.pool import scale_to
from openmoba.ops.triton.rows import LOG2E, SCORE_PRECISION, head_base, load_rows
from openmoba.ops.triton.table import load_paged, page_of

_LOWEST = tl.constexpr(-1e38)
_NO_SORT_KEY = tl.constexpr(-(2**63))
_ABOVE_ALL = tl.constexpr(2**63 - 1)
_TAKEN = tl.constexpr(-(2**31))
_ROW_EXPONENT = tl.constexpr(14)  # query rows are scaled to [2^14, 2^15), so that bf16 fits fp16


@triton.jit(repr=called("decode_score"), do_not_specialize=["blocks"])
def score(
    q,
    centroids,
    workspace,
    length_ptr,
    packed,
    blocks,
    block_size,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Score N blocks for up to M query rows, times a power of two per row.

    Those of the last query's past, which are all that are read. Packed: for TOKENS query tokens of one sequence.
    """
    if OVERLAPS:  # `attend` may start, and does all that needs no score before it waits
        gdc_launch_dependents()
    ROWS: tl.constexpr = TOKENS * GROUP
    TILES: tl.constexpr = (ROWS + M - 1) // M
    # Query rows of a key/value head stand in one tile: they share its centroids, which are what this kernel reads.
    batch = tl.program_id(2)
    head = tl.program_id(1) // TILES
    row_M = tl.program_id(1) % TILES * M + tl.arange(0, M)
    if packed is None:
        rows = ROWS
        flat_M = (batch * tl.num_programs(1) // TILES + head) * ROWS + row_M
    else:
        sequence, tile = locate(batch, packed.cu_q, packed.sequences, 0, TOKENS, True)
        begin, new = span(sequence, packed.cu_q, 0, True)
        queries = tl.minimum(new - tile * TOKENS, TOKENS)
        if queries <= 0:
            return
        rows = queries * GROUP
        batch = begin + tile * TOKENS
        flat_M = (batch + row_M // GROUP) * (tl.num_programs(1) // TILES * GROUP) + head * GROUP + row_M % GROUP
    # Once per query row, before anything else may return: `attend` counts its finished programs here.
    if tl.program_id(0) == 0:
        tl.store(workspace.ptr + flat_M, 0.0, mask=row_M < rows)
    # The grid is for all blocks that the cache has room for; how many there are is read here, so that one graph serves
    # a growing cache.
    block_N = tl.program_id(0) * N + tl.arange(0, N)
    if packed is None:
        past = tl.minimum((tl.load(length_ptr + batch) - 1) // block_size, blocks)
    else:
        last_query = tl.load(length_ptr + sequence) - new + tile * TOKENS + queries - 1
        past = tl.minimum(last_query // block_size, blocks)
    if tl.program_id(0) * N >= past:
        return
    q_ptr = head_base(q, batch, head * GROUP)
    q_at_M = (row_M // GROUP).to(tl.int64) * q.token + (row_M % GROUP).to(tl.int64) * q.head
    if packed is None:
        centroid_ptr = head_base(centroids, batch, head)
    else:
        last_key_N = (block_N + 1) * block_size - 1
        page_N, place_N = page_of(packed, sequence, last_key_N, block_N < past)
        centroid_at_N = page_N * centroids.batch + (place_N // block_size).to(tl.int64) * centroids.token
        centroid_ptr = head_base(centroids, 0 * head, head)
    # A power of two per row changes no ranking, and brings bf16 into the range of the fp16 that centroids have.
    largest_M = tl.zeros([M], tl.float32)
    for d in tl.static_range(0, D, W):
        q_MW = load_rows(q_ptr + d, q_at_M, 1, row_M < rows, WIDTH - d, W).to(tl.float32)
        largest_M = tl.maximum(largest_M, tl.max(tl.abs(q_MW), 1))
    # W columns at a time: products in fp32 keep their operands in registers.
    scale_M = scale_to(largest_M, _ROW_EXPONENT)
    score_NM = tl.zeros([N, M], tl.float32)
    for d in tl.static_range(0, D, W):
        if packed is None:
            centroid_NW = load_rows(centroid_ptr + d, block_N, centroids.token, block_N < past, WIDTH - d, W)
        else:
            centroid_NW = load_rows(centroid_ptr + d, centroid_at_N, 1, block_N < past, WIDTH - d, W)
        q_MW = load_rows(q_ptr + d, q_at_M, 1, row_M < rows, WIDTH - d, W).to(tl.float32) * scale_M[:, None]
        score_NM = tl.dot(centroid_NW, tl.trans(q_MW.to(centroid_NW.dtype)), score_NM, input_precision=SCORE_PRECISION)
    at_NM = workspace.counters + flat_M[None, :].to(tl.int64) * workspace.padded + block_N[:, None]
    tl.store(workspace.ptr + at_NM, score_NM, mask=(row_M < rows)[None, :] & (block_N < past)[:, None])


@triton.jit
def _orders(score_ptr, block_L, past):
    """Return the scores of `past` blocks as integers that sort like them; the least integer for other blocks."""
    bits_L = tl.load(score_ptr + block_L, mask=block_L < past, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(block_L < past, bits_L ^ ((bits_L >> 31) & 0x7FFFFFFF), _TAKEN)


@triton.jit
def _next_block(score_ptr, past, order_L, below, IN_REGISTERS: tl.constexpr):
    """Return the best of `past` blocks that has not been chosen yet, the later one on a tie; and what is left.

    What is left is `order_L` without that block, or, of more blocks than L, the blocks whose sort key is less than
    `below`: the score's order above, the block in 31 bits.
    """
    L: tl.constexpr = order_L.shape[0]
    block_L = tl.arange(0, L)
    if IN_REGISTERS:
        block = tl.max(tl.where(order_L == tl.max(order_L, 0), block_L, 0), 0)
        order_L = tl.where(block_L == block, _TAKEN, order_L)
    else:
        best_L = tl.full([L], _NO_SORT_KEY, tl.int64)
        for first in range(0, past, L):
            sort_key_L = (_orders(score_ptr, first + block_L, past).to(tl.int64) << 32) | (first + block_L).to(tl.int64)
            best_L = tl.maximum(best_L, tl.where(sort_key_L < below, sort_key_L, _NO_SORT_KEY))
        below = tl.max(best_L, 0)
        block = (below & 0x7FFFFFFF).to(tl.int32)
    return tl.minimum(block, past), order_L, below  # scores that are not numbers must not lead out of the cache


@triton.jit(repr=called("decode_attend"), do_not_specialize=["blocks", "ranks", "pieces"])
def attend(
    q,
    k,
    v,
    workspace,
    out_ptr,
    length_ptr,
    start_ptr,
    packed,
    blocks,
    block_size,
    top_k,
    ranks,
    pieces,
    piece,
    scale,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    CHOOSES: tl.constexpr,
    SHARED: tl.constexpr,
    L: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    PAGES: tl.constexpr,
    TURNS: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attend from one query row to one portion: `ranks` of its blocks, best first, and `piece` keys of each.

    The own block comes first. SPLIT: tokens of a page of the cache, if a block lies in several; else 0. PAGES are then
    looked up at once, in TURNS.
    """
    # Portions of low rank choose longest: they start first.
    portion = tl.num_programs(0) - 1 - tl.program_id(0)
    # One query row per program: rows choose apart, so that what they read differs.
    batch = tl.program_id(2)
    flat = (batch * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    head = tl.program_id(1) // (TOKENS * GROUP)
    token = tl.program_id(1) // GROUP % TOKENS
    member = tl.program_id(1) % GROUP
    d_D = tl.arange(0, D)
    if packed is None:
        sequence = batch
        position = tl.load(length_ptr + batch) - TOKENS + token
    else:
        sequence = sequence_of(batch, packed, True)
        end_q = tl.load(packed.cu_q + sequence + 1)
        if batch >= end_q:  # of no sequence: what fills up a graph's batch
            tl.store(out_ptr + flat * WIDTH + d_D, tl.zeros([D], out_ptr.dtype.element_ty), mask=d_D < WIDTH)
            return
        position = tl.load(length_ptr + sequence) - end_q + batch
    # Ranks of this portion: the own block is rank 0, and past blocks follow, best first.
    own = tl.maximum(position, 0) // block_size
    past = tl.minimum(own, blocks) if CHOOSES else 0
    first = portion // pieces * ranks
    last = tl.minimum(tl.minimum(first + ranks, top_k), past + 1)

    # All that does not depend on scores comes before the wait for them.
    q_ptr = head_base(q, batch, head * GROUP + member) + token.to(tl.int64) * q.token
    q_D = tl.load(q_ptr + d_D, mask=d_D < WIDTH, other=0.0).to(tl.float32) * (scale * LOG2E)
    start_of_row = 0 if start_ptr is None else tl.load(start_ptr + batch)
    k_ptr = head_base(k, batch if packed is None else batch * 0, head) + tl.cast(start_of_row, tl.int64) * k.token
    v_ptr = head_base(v, batch if packed is None else batch * 0, head) + tl.cast(start_of_row, tl.int64) * v.token
    if SPLIT > 0:
        table_ptr = packed.ptr + tl.cast(sequence, tl.int64) * packed.sequence

    if OVERLAPS:
        gdc_wait()
    score_ptr = workspace.ptr + workspace.counters + flat * workspace.padded
    order_L = tl.full([L], _TAKEN, tl.int32)
    below = tl.full([], _ABOVE_ALL, tl.int64)
    # The choice is repeated up to this portion's first rank: a program that chose for all would be waited for.
    if CHOOSES:
        if IN_REGISTERS:
            order_L = _orders(score_ptr, tl.arange(0, L), tl.where(last > 1, past, 0))
        for _ in range(1, tl.minimum(first, last)):
            _block, order_L, below = _next_block(score_ptr, past, order_L, below, IN_REGISTERS)

    # Every place in the tile keeps a softmax of its own until the end: no sums across threads in the loop.
    m_N = tl.full([N], _LOWEST, tl.float32)
    l_N = tl.zeros([N], tl.float32)
    o_ND = tl.zeros([N, D], tl.float32)
    for rank in range(first, last):
        block = own
        if CHOOSES:  # noqa: SIM102
            if rank > 0:  # not part of the condition above, which is the compiler's
                block, order_L, below = _next_block(score_ptr, past, order_L, below, IN_REGISTERS)
        # No key behind the query's own position, which is the causal mask of the own block, and none of another.
        begin = portion % pieces * piece
        end = tl.minimum(tl.minimum(begin + piece, block_size), position + 1 - block * block_size)
        k_page, v_page, first_key = k_ptr, v_ptr, block * block_size
        if SPLIT > 0:
            # Pages are looked up before the loop over keys, whose copies run tiles ahead and must wait for none of it.
            for turn in range(TURNS):
                page = begin // SPLIT + turn * PAGES
                number_P = page + tl.arange(0, PAGES)
                page_P = tl.load(table_ptr + first_key // SPLIT + number_P, mask=number_P * SPLIT < end, other=0)
                m_N, l_N, o_ND = _attend_keys(
                    q_D, k, v, k_page, v_page, first_key, tl.maximum(begin, page * SPLIT),
                    tl.minimum(end, (page + PAGES) * SPLIT), first_key // SPLIT + page, page_P, m_N, l_N, o_ND,
                    SPLIT, WIDTH, STAGES,
                )  # fmt: skip
        else:
            if packed is not None:
                page, first_key = page_of(packed, sequence, first_key)
                k_page = head_base(k, page, head)
                v_page = head_base(v, page, head)
            m_N, l_N, o_ND = _attend_keys(
                q_D, k, v, k_page, v_page, first_key, begin, end, 0, None, m_N, l_N, o_ND, SPLIT, WIDTH, STAGES
            )
    o_D, lse = _normalised(m_N, l_N, o_ND)

    # A row of one portion is done. Of several, each writes its partial, and whichever program is the last to finish
    # merges them all, in the order of portions.
    HEADS = tl.num_programs(1) // TOKENS
    out_ptr += ((batch * TOKENS + token).to(tl.int64) * HEADS + head * GROUP + member) * WIDTH
    if SHARED:
        portions = tl.num_programs(0)
        rows = (tl.num_programs(2) * tl.num_programs(1)).to(tl.int64)
        partial_ptr = workspace.ptr + workspace.counters + rows * workspace.padded + flat * portions * WIDTH
        lse_ptr = workspace.ptr + workspace.counters + rows * (workspace.padded + portions * WIDTH) + flat * portions
        tl.store(partial_ptr + portion * WIDTH + d_D, o_D, mask=d_D < WIDTH)
        tl.store(lse_ptr + portion, lse)
        tl.debug_barrier()  # all threads have written their part before one of them says so
        finished_ptr = workspace.ptr.to(tl.pointer_type(tl.int32), bitcast=True) + flat
        if tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == portions - 1:
            o_D = _merged(partial_ptr, lse_ptr, portions, WIDTH, D, C)
            tl.store(out_ptr + d_D, o_D.to(out_ptr.dtype.element_ty), mask=d_D < WIDTH)
    else:
        tl.store(out_ptr + d_D, o_D.to(out_ptr.dtype.element_ty), mask=d_D < WIDTH)


@triton.jit
def _attend_keys(
    q_D, k, v, k_base, v_base, first_key, begin, end, first_page, page_P, m_N, l_N, o_ND,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add keys `begin` to `end` of a block to N softmaxes, of maximum m, sum l and weighted values o.

    SPLIT: `page_P` are pages of the sequence, from its page number `first_page` on, where all these keys lie.
    """
    N: tl.constexpr = o_ND.shape[0]
    D: tl.constexpr = o_ND.shape[1]
    for start in tl.range(begin, end, N, num_stages=STAGES):
        n_N = start + tl.arange(0, N)
        at_N = first_key + n_N
        if SPLIT > 0:
            page_N = tl.gather(page_P, tl.where(n_N < end, at_N // SPLIT - first_page, 0), 0)
            k_ND, v_ND = load_paged(k, v, k_base, v_base, page_N, at_N % SPLIT, n_N < end, WIDTH, D)
        else:
            k_ND = load_rows(k_base, at_N, k.token, n_N < end, WIDTH, D)
            v_ND = load_rows(v_base, at_N, v.token, n_N < end, WIDTH, D)
        s_N = tl.where(n_N < end, tl.sum(k_ND.to(tl.float32) * q_D[None, :], 1), _LOWEST)
        m_new_N = tl.maximum(m_N, s_N)
        alpha_N = tl.exp2(m_N - m_new_N)
        p_N = tl.where(n_N < end, tl.exp2(s_N - m_new_N), 0.0)
        l_N = l_N * alpha_N + p_N
        o_ND = o_ND * alpha_N[:, None] + p_N[:, None] * v_ND.to(tl.float32)
        m_N = m_new_N
    return m_N, l_N, o_ND


@triton.jit
def _normalised(m_N, l_N, o_ND):
    """Make one softmax of N with maximum m, sum l and weighted values o: return its value and log-sum-exp.

    In base 2; zero and minus infinity where nothing was read.
    """
    m = tl.max(m_N, 0)
    weight_N = tl.exp2(m_N - m)
    total = tl.sum(l_N * weight_N, 0)
    divisor = tl.where(total > 0, total, 1.0)
    return tl.sum(o_ND * weight_N[:, None], 0) / divisor, tl.where(total > 0, m + tl.log2(divisor), -float("inf"))


@triton.jit
def _merged(partial_ptr, lse_ptr, portions, WIDTH: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Merge a query row's portions. Other programs wrote these: nothing is read from the L1 cache."""
    d_D = tl.arange(0, D)
    m_C = tl.full([C], _LOWEST, tl.float32)
    l_C = tl.zeros([C], tl.float32)
    o_CD = tl.zeros([C, D], tl.float32)
    for first in range(0, portions, C):
        c_C = first + tl.arange(0, C)
        partial_at_CD = c_C[:, None] * WIDTH + d_D[None, :]
        exists_CD = (c_C < portions)[:, None] & (d_D < WIDTH)[None, :]
        lse_C = tl.load(lse_ptr + c_C, mask=c_C < portions, other=-float("inf"), cache_modifier=".cg")
        partial_CD = tl.load(partial_ptr + partial_at_CD, mask=exists_CD, other=0.0, cache_modifier=".cg")
        m_new_C = tl.maximum(m_C, lse_C)
        alpha_C = tl.exp2(m_C - m_new_C)
        weight_C = tl.exp2(lse_C - m_new_C)
        l_C = l_C * alpha_C + weight_C
        o_CD = o_CD * alpha_C[:, None] + weight_C[:, None] * partial_CD
        m_C = m_new_C
    o_D, _lse = _normalised(m_C, l_C, o_CD)
    return o_D
