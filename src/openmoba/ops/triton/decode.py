"""Decode: a few queries per row over a paged cache, in three launches that wait for nothing.

    score    s[r, p] = <q_r, c_p> for the pages p before the last query's own, a tile of pages per program
    attend   a program finds its share of the pages that a query reads, and attends to them
    merge    o = sum_i o_i exp(lse_i - lse), lse = log sum_i exp lse_i, over a query's shares

Source: MoBA technical report, arXiv 2502.13189, equations 2 to 6. Shares are as small as it takes to keep all
multiprocessors busy: some of the `top_k` pages, or a piece of one page. Every share repeats the choice up to its own
last page, which costs less than a launch of its own. All sizes that change while decoding are read on the device.

A *query row* r is (query token, query head of one key/value head's group). M query rows, N pages or keys per tile,
L pages looked at at once, C shares merged at once, D head width padded to a power of two (WIDTH is the real one), of
which the scores take W at a time.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.forward import LOG2E, load_rows
from openmoba.ops.triton.geometry import strides

_PAGES_PER_TILE = 64
_WIDTH_PER_STEP = 64
_MOST_ROWS = 64  # query rows per tile of the scores
_LANES = 1024
_MERGED_AT_ONCE = 16
_TILE_BYTES = 2**13  # keys of one tile: small enough for four programs per multiprocessor
_PROGRAMS_PER_MULTIPROCESSOR = 4

_LOWEST = tl.constexpr(-1e38)
_NO_KEY = tl.constexpr(-(2**63))
_ABOVE_ALL = tl.constexpr(2**63 - 1)
_OWN = tl.constexpr(2**31 - 1)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    """`openmoba.ops.decode.moba_decode`, checked; the last dimension of all tensors is contiguous."""
    batch, tokens, heads, width = q.shape
    pages, kv_heads = centroids.shape[1:3]
    group = heads // kv_heads
    rows = tokens * group
    top_k = min(top_k, pages + 1)
    d = max(16, triton.next_power_of_2(width))
    padded = triton.cdiv(pages + 1, _LANES) * _LANES
    sizes = {"TOKENS": tokens, "GROUP": group, "WIDTH": width, "D": d}

    scores = q.new_empty((batch * heads * tokens, padded if top_k > 1 else 0), dtype=torch.float32)
    if top_k > 1:
        m = min(_MOST_ROWS, max(16, triton.next_power_of_2(rows)))
        _score[(triton.cdiv(pages, _PAGES_PER_TILE), kv_heads * triton.cdiv(rows, m), batch)](
            q,
            centroids,
            scores,
            lengths,
            pages,
            block_size,
            padded,
            *strides(q),
            *strides(centroids),
            **sizes,
            M=m,
            N=_PAGES_PER_TILE,
            W=min(d, _WIDTH_PER_STEP),
            num_warps=4,
        )
    n = keys_per_tile(block_size, d, k_cache.dtype)
    ranks, piece = share_of(batch * heads * tokens, block_size, top_k, n, multiprocessors(q.device))
    pieces = triton.cdiv(block_size, piece)
    shares = triton.cdiv(top_k, ranks) * pieces
    partial = q.new_empty((batch * heads * tokens, shares, width), dtype=torch.float32)
    partial_lse = q.new_empty((batch * heads * tokens, shares), dtype=torch.float32)
    _attend[(shares, heads * tokens, batch)](
        q,
        k_cache,
        v_cache,
        scores,
        partial,
        partial_lse,
        lengths,
        starts,
        pages,
        block_size,
        padded,
        top_k,
        ranks,
        pieces,
        piece,
        scale,
        *strides(q),
        *strides(k_cache),
        *strides(v_cache),
        **sizes,
        CHOOSES=top_k > 1,
        L=_LANES,
        N=n,
        num_warps=4,
        maxnreg=128,
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _merge[(heads * tokens, batch)](partial, partial_lse, out, shares, **sizes, C=_MERGED_AT_ONCE, num_warps=4)
    return out


def keys_per_tile(block_size: int, d: int, dtype: torch.dtype) -> int:
    """Keys that a program of the attention loads at once."""
    return min(64, _TILE_BYTES // (d * dtype.itemsize), max(16, int(triton.next_power_of_2(block_size))))


def share_of(rows: int, block_size: int, top_k: int, tile: int, multiprocessors: int) -> tuple[int, int]:
    """What one program attends to, for `rows` query rows in all: a number of pages, and keys of each of them."""
    wanted = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, rows)
    if wanted <= top_k:
        return top_k // wanted, block_size
    return 1, triton.cdiv(triton.cdiv(block_size, triton.cdiv(wanted, top_k)), tile) * tile


@cache
def multiprocessors(device: torch.device) -> int:
    """Of this GPU; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["pages"])
def _score(
    q_ptr,
    centroid_ptr,
    score_ptr,
    length_ptr,
    pages,
    block_size,
    padded,
    q_batch,
    q_token,
    q_head,
    centroid_batch,
    centroid_page,
    centroid_head,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
):
    """Scores of N pages for up to M query rows; those of the last query's past, which are all that are read."""
    ROWS: tl.constexpr = TOKENS * GROUP
    TILES: tl.constexpr = (ROWS + M - 1) // M
    batch = tl.program_id(2)
    head = tl.program_id(1) // TILES
    page_N = tl.program_id(0) * N + tl.arange(0, N)
    past = tl.minimum((tl.load(length_ptr + batch) - 1) // block_size, pages)
    if tl.program_id(0) * N >= past:
        return
    row_M = tl.program_id(1) % TILES * M + tl.arange(0, M)
    q_ptr += batch.to(tl.int64) * q_batch + (head * GROUP).to(tl.int64) * q_head
    q_at_M = (row_M // GROUP).to(tl.int64) * q_token + (row_M % GROUP) * q_head
    centroid_ptr += batch.to(tl.int64) * centroid_batch + head.to(tl.int64) * centroid_head
    score_NM = tl.zeros([N, M], tl.float32)
    for d in tl.static_range(0, D, W):
        centroid_NW = load_rows(centroid_ptr + d, page_N, centroid_page, page_N < past, WIDTH - d, W)
        q_MW = load_rows(q_ptr + d, q_at_M, 1, row_M < ROWS, WIDTH - d, W).to(tl.float32)
        score_NM = tl.dot(centroid_NW, tl.trans(q_MW), score_NM, input_precision="tf32x3")
    flat_M = (batch * tl.num_programs(1) // TILES + head) * ROWS + row_M
    at_NM = flat_M[None, :].to(tl.int64) * padded + page_N[:, None]
    tl.store(score_ptr + at_NM, score_NM, mask=(row_M < ROWS)[None, :] & (page_N < past)[:, None])


@triton.jit
def _next_page(score_ptr, past, below, L: tl.constexpr):
    """The largest sort key under `below` of a query with `past` scored pages: its order above, its page in 31 bits.

    Later pages win ties. Number `past` stands for the own page, which comes before all others.
    """
    best_L = tl.full([L], _NO_KEY, tl.int64)
    for first in range(0, past + 1, L):
        page_L = first + tl.arange(0, L)
        bits_L = tl.load(score_ptr + page_L).to(tl.int32, bitcast=True)
        order_L = tl.where(page_L == past, _OWN, bits_L ^ ((bits_L >> 31) & 0x7FFFFFFF))
        key_L = (order_L.to(tl.int64) << 32) | page_L.to(tl.int64)
        best_L = tl.maximum(best_L, tl.where((page_L <= past) & (key_L < below), key_L, _NO_KEY))
    return tl.max(best_L, 0)


@triton.jit(do_not_specialize=["pages", "ranks", "pieces"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    score_ptr,
    partial_ptr,
    partial_lse_ptr,
    length_ptr,
    start_ptr,
    pages,
    block_size,
    padded,
    top_k,
    ranks,
    pieces,
    piece,
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
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    CHOOSES: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
):
    """One query row's attention to one share: `ranks` of its pages, best first, and `piece` keys of each."""
    # Shares of low rank choose longest: they start first.
    share = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(2)
    flat = batch * tl.num_programs(1) + tl.program_id(1)
    head = tl.program_id(1) // (TOKENS * GROUP)
    token = tl.program_id(1) // GROUP % TOKENS
    member = tl.program_id(1) % GROUP
    position = tl.load(length_ptr + batch) - TOKENS + token
    own = tl.maximum(position, 0) // block_size
    past = tl.minimum(own, pages) if CHOOSES else 0
    first = share // pieces * ranks
    last = tl.minimum(tl.minimum(first + ranks, top_k), past + 1)

    d_D = tl.arange(0, D)
    q_ptr += batch.to(tl.int64) * q_batch + token.to(tl.int64) * q_token + (head * GROUP + member) * q_head
    q_D = tl.load(q_ptr + d_D, mask=d_D < WIDTH, other=0.0).to(tl.float32) * (scale * LOG2E)
    slot = 0 if start_ptr is None else tl.load(start_ptr + batch)
    k_ptr += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + tl.cast(slot, tl.int64) * k_token
    v_ptr += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head + tl.cast(slot, tl.int64) * v_token
    score_ptr += flat.to(tl.int64) * padded

    # Every place in the tile keeps a softmax of its own until the end: no sums across threads in the loop.
    m_N = tl.full([N], _LOWEST, tl.float32)
    l_N = tl.zeros([N], tl.float32)
    o_ND = tl.zeros([N, D], tl.float32)
    below = tl.full([], _ABOVE_ALL, tl.int64)
    for rank in range(0, last):
        page = own
        if CHOOSES:
            below = _next_page(score_ptr, past, below, L)
            index = (below & 0x7FFFFFFF).to(tl.int32)
            page = tl.where(index == past, own, index)
        begin = share % pieces * piece
        end = tl.minimum(tl.minimum(begin + piece, block_size), position + 1 - page * block_size)
        end = tl.where(rank < first, begin, end)
        for start in range(begin, end, N):
            n_N = start + tl.arange(0, N)
            k_ND = load_rows(k_ptr, page * block_size + n_N, k_token, n_N < end, WIDTH, D)
            v_ND = load_rows(v_ptr, page * block_size + n_N, v_token, n_N < end, WIDTH, D)
            s_N = tl.where(n_N < end, tl.sum(k_ND.to(tl.float32) * q_D[None, :], 1), _LOWEST)
            m_new_N = tl.maximum(m_N, s_N)
            alpha_N = tl.exp2(m_N - m_new_N)
            p_N = tl.where(n_N < end, tl.exp2(s_N - m_new_N), 0.0)
            l_N = l_N * alpha_N + p_N
            o_ND = o_ND * alpha_N[:, None] + p_N[:, None] * v_ND.to(tl.float32)
            m_N = m_new_N
    m = tl.max(m_N, 0)
    weight_N = tl.exp2(m_N - m)
    total = tl.sum(l_N * weight_N, 0)
    divisor = tl.where(total > 0, total, 1.0)
    o_D = tl.sum(o_ND * weight_N[:, None], 0) / divisor
    at = flat.to(tl.int64) * tl.num_programs(0) + share
    tl.store(partial_ptr + at * WIDTH + d_D, o_D, mask=d_D < WIDTH)
    tl.store(partial_lse_ptr + at, tl.where(total > 0, m + tl.log2(divisor), -float("inf")))


@triton.jit(do_not_specialize=["shares"])
def _merge(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    shares,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
):
    """One query row's output; zero for a row that reads nothing."""
    batch = tl.program_id(1)
    flat = (batch * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    partial_lse_ptr += flat * shares
    c_C = tl.arange(0, C)
    m_C = tl.full([C], _LOWEST, tl.float32)
    for first in range(0, shares, C):
        lse_C = tl.load(partial_lse_ptr + first + c_C, mask=first + c_C < shares, other=-float("inf"))
        m_C = tl.maximum(m_C, lse_C)
    m = tl.max(m_C, 0)
    l_C = tl.zeros([C], tl.float32)
    o_CD = tl.zeros([C, D], tl.float32)
    for first in range(0, shares, C):
        exists_C = first + c_C < shares
        lse_C = tl.load(partial_lse_ptr + first + c_C, mask=exists_C, other=-float("inf"))
        part_CD = load_rows(partial_ptr, flat * shares + first + c_C, WIDTH, exists_C, WIDTH, D)
        weight_C = tl.exp2(lse_C - m)
        l_C += weight_C
        o_CD += part_CD * weight_C[:, None]
    total = tl.sum(l_C, 0)
    o_D = tl.sum(o_CD, 0) / tl.where(total > 0, total, 1.0)
    token = tl.program_id(0) // GROUP % TOKENS
    head = tl.program_id(0) // (TOKENS * GROUP) * GROUP + tl.program_id(0) % GROUP
    HEADS = tl.num_programs(0) // TOKENS
    d_D = tl.arange(0, D)
    out_ptr += ((batch * TOKENS + token).to(tl.int64) * HEADS + head) * WIDTH
    tl.store(out_ptr + d_D, o_D.to(out_ptr.dtype.element_ty), mask=d_D < WIDTH)
