"""The kernels' shared words: rows of a matrix in and out, products, softmax, and where the rows of a list or block lie.

M rows, N keys per tile, D head width padded to a power of two (WIDTH is the real one). Inside kernels logarithms have
base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openmoba.ops.triton.geometry import locate, span

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Of scores of fp32 centroids; AMD's compiler has no products in three parts.
SCORE_PRECISION: tl.constexpr = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")

# A row's statistics take 16 bytes: with fewer elements than a warp group has threads, Triton 3.6 would load them once
# per thread of the matrix layout instead of once per row, which more than doubles the inner loop's instructions.
STATISTICS = tl.constexpr(4)


@triton.jit
def load_rows(base, at, stride, valid, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load rows `at` of a strided matrix, `[len(at), D]`: zero where not `valid` (None: all are), beyond WIDTH."""
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
    """Store what `load_rows` would load."""
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
    """Multiply matrices, accumulated in fp32; fp32 operands are not rounded to TF32."""
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
    """Add sums of at most 64 products in pairs: the rounding error of one long sum grows with its length."""
    if a.shape[1] > 64:
        a_even, a_odd = _columns(a)
        b_even, b_odd = _columns(tl.trans(b))
        return _add(_dot_float32(a_even, tl.trans(b_even)), _dot_float32(a_odd, tl.trans(b_odd)))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _columns(x):
    """Return the even and the odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _add(x, y):
    """Return x + y; as a plain sum, the compiler would let one product go on from where the other ends."""
    return tl.fma(x, tl.full(x.shape, 1.0, tl.float32), y)


@triton.jit
def pair_rows(pairs_ptr, begin, end, head_rows, GROUP: tl.constexpr, PAST: tl.constexpr, M: tl.constexpr):
    """Load M pairs of a list: pair, its flat query token, its head within the group, and which of them exist.

    Places beyond the end repeat the last pair: addresses need no mask, and the same result is stored twice.
    `head_rows` is the number of rows of the key/value heads before this one in the plan.
    """
    at = begin + tl.arange(0, M)
    pair = tl.load(pairs_ptr + tl.minimum(at, end - 1))
    row = pair // PAST - head_rows
    return pair, row // GROUP, row % GROUP, at < end


@triton.jit
def online_softmax(s_MN, v_ND, m_M, l_M, o_MD, scale_log2):
    """Fold a tile of inner products and its values into running maximum (base 2), sum and output."""
    m_new_M = tl.maximum(m_M, tl.max(s_MN, 1) * scale_log2)
    alpha_M = tl.exp2(m_M - m_new_M)
    p_MN = tl.exp2(s_MN * scale_log2 - m_new_M[:, None])
    o_MD = dot(p_MN.to(v_ND.dtype), v_ND, o_MD * alpha_M[:, None])
    return m_new_M, l_M * alpha_M + tl.sum(p_MN, 1), o_MD


@triton.jit
def head_base(x, sequence, head):
    """Return where a sequence's batch row begins, in one head of x."""
    return x.ptr + sequence.to(tl.int64) * x.batch + head.to(tl.int64) * x.head


@triton.jit
def own_rows(block_slot, call, PACKED: tl.constexpr):
    """Find the sequence and number of a block slot, its keys, and its queries.

    Returns (sequence, block, first key of the block, `block_keys`, first query of the sequence, `shift`): the block has
    so many keys, an empty block slot none, and key i has query number `i + shift` in the sequence, absent if negative.
    """
    block_size = call.block_size
    sequence, block = locate(block_slot, call.cu_k, call.sequences, call.tokens_k, block_size, PACKED)
    key_begin, keys = span(sequence, call.cu_k, call.tokens_k, PACKED)
    query_begin, queries = span(sequence, call.cu_q, call.tokens_q, PACKED)
    block_keys = tl.minimum(keys - block * block_size, block_size)
    return sequence, block, key_begin + block * block_size, block_keys, query_begin, block * block_size + queries - keys


@triton.jit
def reads(rank, count_M, valid):
    """Say which rows read a past block of this rank: all valid ones, or by `count_M`, 0 for rows not valid."""
    if count_M is None:
        return valid
    else:
        return rank < count_M


@triton.jit
def load_queries(
    d_out_base, q_base, statistics_ptr, d_out_at, q_at, statistic_at, valid, WIDTH: tl.constexpr, D: tl.constexpr
):
    """Load queries and output gradients with their base-2 LSE and delta; rows not `valid` get P = 0.

    Their addresses must be readable all the same.
    """
    q_MD = load_rows(q_base, q_at, 1, None, WIDTH, D)
    d_out_MD = load_rows(d_out_base, d_out_at, 1, None, WIDTH, D)
    c = tl.arange(0, STATISTICS)
    both_MC = tl.load(statistics_ptr + statistic_at[:, None] * STATISTICS + c[None, :])
    both_MC = tl.where((c == 0)[None, :] & ~valid[:, None], float("inf"), both_MC)
    lse_M = tl.sum(tl.where((c == 0)[None, :], both_MC, 0.0), 1)
    delta_M = tl.sum(tl.where((c == 1)[None, :], both_MC, 0.0), 1)
    return q_MD, d_out_MD, lse_M, delta_M
