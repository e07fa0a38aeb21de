"""Exact streaming top-k: the device code that the gate and its second look share.

A score of block j becomes an int32 *sort key*, unique, in the order of scores, later blocks first among equals:

    sort key = fixed_point(score) * 2^b + j,   with payload and b bits of index together 31 bits

The fixed point spans +-|q| * max |c| over the past blocks of the row, a bound on the score that no later block changes.
Lane l of a row keeps the KEEP best sort keys of the blocks j with j mod LANES = l. If a lane's last kept one is picked,
the lane may hide a further candidate, and picking must stop there: the rest needs another pass over those below.
In both ranking functions `fewest <= past_M <= most` holds for live rows, a pick is written as `offset + block`, a
missing one as `none`, best first.

M rows, L lanes, N = 2 L blocks per tile, D head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openmoba.ops.triton.pool import scale_to
from openmoba.ops.triton.rows import SCORE_PRECISION

# 1.5 * 2^23: adding it leaves a number below 2^22 in magnitude rounded to an integer in the low mantissa bits.
_CENTER = tl.constexpr(12582912.0)
CENTER_BITS = 0x4B400000
_NO_CEILING = tl.constexpr(2**31 - 1)
_ROW_EXPONENT = tl.constexpr(14)


@triton.jit
def load_scaled_rows(
    q_ptr, offset_M, live_M, largest_M, payload_scale, DTYPE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """Load query rows in DTYPE, each scaled by a power of two (no ranking changes, bf16 fits fp16).

    Also what takes their scores into the range of the fixed point, `payload_scale / (|q| * largest |c|)`.
    """
    d_D = tl.arange(0, D)
    mask = live_M[:, None] & (d_D < WIDTH)
    q_MD = tl.load(q_ptr + offset_M[:, None] + d_D, mask=mask, other=0.0).to(tl.float32)
    q_MD = (q_MD * scale_to(tl.max(tl.abs(q_MD), 1), _ROW_EXPONENT)[:, None]).to(DTYPE)
    wide_MD = q_MD.to(tl.float32)
    bound_M = tl.sqrt(tl.sum(wide_MD * wide_MD, 1)) * largest_M
    return q_MD, payload_scale / tl.where(bound_M > 0, bound_M, 1.0)


@triton.jit
def largest_norms(norm_ptr, past_M, fewest, most):
    """Return the largest centroid norm among the first `past_M` blocks, `fewest <= past_M <= most`."""
    CHUNK: tl.constexpr = 256
    NARROW: tl.constexpr = 16
    shared_C = tl.zeros([CHUNK], tl.float32)
    for start in range(0, fewest, CHUNK):
        at_C = start + tl.arange(0, CHUNK)
        shared_C = tl.maximum(shared_C, tl.load(norm_ptr + at_C, mask=at_C < fewest, other=0.0))
    largest_M = tl.zeros_like(past_M).to(tl.float32) + tl.max(shared_C, 0)
    for start in range(fewest, most, NARROW):
        at_N = start + tl.arange(0, NARROW)
        norm_N = tl.load(norm_ptr + at_N, mask=at_N < most, other=0.0)
        norm_MN = tl.where(at_N < past_M[:, None], norm_N, 0.0)
        largest_M = tl.maximum(largest_M, tl.max(norm_MN, 1))
    return largest_M


@triton.jit
def insert_two(first_ML, second_ML, third_ML, x_ML, y_ML, KEEP: tl.constexpr):
    """Return the KEEP largest of first >= second >= third and x, y, sorted."""
    high_ML = tl.maximum(x_ML, y_ML)
    low_ML = tl.minimum(x_ML, y_ML)
    if KEEP == 3:
        third_ML = tl.maximum(tl.maximum(third_ML, tl.minimum(second_ML, high_ML)), tl.minimum(first_ML, low_ML))
    if KEEP >= 2:
        second_ML = tl.maximum(tl.maximum(second_ML, low_ML), tl.minimum(first_ML, high_ML))
    first_ML = tl.maximum(first_ML, high_ML)
    return first_ML, second_ML, third_ML


@triton.jit
def _keep_tile(
    kept_1, kept_2, kept_3, tile, q_MD, scale_M, past_M, ceiling_M, most, centroid_ptr, fixed,
    LANES: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """Score the blocks `[2 LANES tile, 2 LANES (tile + 1))` and keep the best per lane.

    In these loops a sort key's index is `j // LANES`; the lane is appended once, at the end.
    """
    M: tl.constexpr = q_MD.shape[0]
    D: tl.constexpr = q_MD.shape[1]
    first = tile * (2 * LANES)
    block_N = tl.arange(0, 2 * LANES)
    if MASKED:  # stay within what the pool wrote
        block_N = tl.minimum(block_N, most - 1 - first)
    # One integer holds score and block, so that comparing two candidates is one instruction, and ties are none.
    tile_ptr = centroid_ptr + tl.cast(first, tl.int64) * D
    centroid_ND = tl.load(tile_ptr + block_N.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :])
    score_MN = tl.dot(q_MD, tl.trans(centroid_ND), input_precision=SCORE_PRECISION)
    fixed_MN = (score_MN * scale_M[:, None] + _CENTER).to(tl.int32, bitcast=True) * fixed.index_range
    # Halves, not neighbours, share a lane: neighbouring blocks are often chosen together.
    x_ML, y_ML = tl.split(tl.permute(tl.reshape(fixed_MN, [M, 2, LANES]), [0, 2, 1]))
    x_ML += 2 * tile - fixed.index_base
    y_ML += 2 * tile + 1 - fixed.index_base
    # -1 is below every sort key: what a row must not choose loses against all else.
    lane_L = tl.arange(0, LANES)[None, :]
    if MASKED:
        past_M = past_M - first
        x_ML = tl.where(lane_L < past_M[:, None], x_ML, -1)
        y_ML = tl.where(lane_L + LANES < past_M[:, None], y_ML, -1)
    if BELOW:
        x_ML = tl.where(x_ML * LANES + lane_L < ceiling_M[:, None], x_ML, -1)
        y_ML = tl.where(y_ML * LANES + lane_L < ceiling_M[:, None], y_ML, -1)
    return insert_two(kept_1, kept_2, kept_3, x_ML, y_ML, KEEP)


@triton.jit
def keep_best(
    q_MD, scale_M, past_M, ceiling_M, fewest, most, centroid_ptr, fixed,
    LANES: tl.constexpr, KEEP: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """Keep, in one pass, the KEEP best sort keys of each lane (negative: none), below `ceiling_M` if BELOW."""
    M: tl.constexpr = q_MD.shape[0]
    kept_1 = tl.full([M, LANES], -1, tl.int32)
    kept_2 = kept_1
    kept_3 = kept_1
    # Tiles that all rows have whole are the many and need no mask: a loop of their own, pipelined. The others, in which
    # rows end, are few, and get no buffers.
    whole = fewest // (2 * LANES)
    for tile in tl.range(whole, tl.cdiv(most, 2 * LANES), num_stages=1):
        kept_1, kept_2, kept_3 = _keep_tile(
            kept_1, kept_2, kept_3, tile, q_MD, scale_M, past_M, ceiling_M, most, centroid_ptr, fixed,
            LANES, KEEP, True, BELOW,
        )  # fmt: skip
    for tile in range(0, whole):
        kept_1, kept_2, kept_3 = _keep_tile(
            kept_1, kept_2, kept_3, tile, q_MD, scale_M, past_M, ceiling_M, most, centroid_ptr, fixed,
            LANES, KEEP, False, BELOW,
        )  # fmt: skip
    lane_L = tl.arange(0, LANES)[None, :]
    return kept_1 * LANES + lane_L, kept_2 * LANES + lane_L, kept_3 * LANES + lane_L


@triton.jit
def pop(kept_1, kept_2, kept_3, KEEP: tl.constexpr, COMPLETE: tl.constexpr):
    """Take the best sort key of each row out of its lanes.

    A last kept one may stay in its lane: nothing counts after it, unless lanes hide nothing (COMPLETE).
    """
    best_M = tl.max(kept_1, 1)
    hit = kept_1 == best_M[:, None]
    kept_1 = tl.where(hit, kept_2 if KEEP >= 2 else -1, kept_1)
    if KEEP >= 2:
        kept_2 = tl.where(hit, kept_3 if KEEP == 3 else -1, kept_2)
    if KEEP == 3 and COMPLETE:
        kept_3 = tl.where(hit, -1, kept_3)
    return best_M, kept_1, kept_2, kept_3


@triton.jit
def rank_once(
    q_MD, scale_M, past_M, fewest, most, centroid_ptr, fixed,
    PICKS: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, COMPLETE: tl.constexpr,
):  # fmt: skip
    """Rank in one pass: the best blocks in a row's first PICKS lanes (-1: none); may a lane hide one?"""
    lane_L = tl.arange(0, LANES)[None, :]
    kept_1, kept_2, kept_3 = keep_best(
        q_MD, scale_M, past_M, past_M, fewest, most, centroid_ptr, fixed, LANES, KEEP, False
    )
    # A lane that kept three may have dropped a fourth, which is less than its third: only if that third is picked, and
    # something after it, can the fourth be missing.
    hiding_M = tl.max(kept_3, 1)
    hidden_M = hiding_M < -1
    picked_ML = tl.full(kept_1.shape, -1, tl.int32)
    for rank in tl.static_range(PICKS):
        best_M, kept_1, kept_2, kept_3 = pop(kept_1, kept_2, kept_3, KEEP, COMPLETE)
        picked_ML = tl.where(lane_L == rank, best_M[:, None], picked_ML)
        if rank == PICKS - 2:
            # A last kept one was picked, and not as the last pick.
            hidden_M = hiding_M >= tl.maximum(best_M, 0)
    return tl.where(picked_ML < 0, -1, picked_ML & (fixed.index_range * LANES - 1)), hidden_M


@triton.jit
def rank_repeatedly(
    q_MD, scale_M, past_M, live_M, fewest, most, centroid_ptr, out_ptr_M, offset, none, fixed,
    PICKS: tl.constexpr, ROUNDS: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, COMPLETE: tl.constexpr,
):  # fmt: skip
    """Rank in as many passes as live rows need, each over the sort keys below the last pick, up to ROUNDS each."""
    done_M = tl.zeros_like(past_M)
    ceiling_M = tl.full(past_M.shape, _NO_CEILING, tl.int32)
    # A pass is exact as far as it gets: the next one looks only below the last pick, so nothing is picked twice.
    while tl.max((live_M & (done_M < PICKS)).to(tl.int32), 0) > 0:
        kept_1, kept_2, kept_3 = keep_best(
            q_MD, scale_M, past_M, ceiling_M, fewest, most, centroid_ptr, fixed, LANES, KEEP, True
        )
        hiding_M = tl.max(kept_3, 1)
        picking_M = live_M & (done_M < PICKS)
        for _ in range(ROUNDS):
            best_M, kept_1, kept_2, kept_3 = pop(kept_1, kept_2, kept_3, KEEP, COMPLETE)
            block_M = tl.where(best_M < 0, none, offset + (best_M & (fixed.index_range * LANES - 1)))
            tl.store(out_ptr_M + done_M, block_M.to(out_ptr_M.dtype.element_ty), mask=picking_M)
            ceiling_M = tl.where(picking_M, best_M, ceiling_M)
            done_M += picking_M.to(tl.int32)
            picking_M = picking_M & (done_M < PICKS)
            # A row stops where a lane's last kept one was picked, since that lane may hide the next pick. A row that
            # has none left goes on, and writes that for the rest of its picks.
            if not COMPLETE:
                picking_M = picking_M & ((best_M > hiding_M) | (best_M < 0))
