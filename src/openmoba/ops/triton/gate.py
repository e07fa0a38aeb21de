"""Gate: rank the past blocks of every row in one pass, and of some rows again.

A *row* is (query token, query head of one key/value head's group); a group shares its centroids. A tile of the gate
holds the rows of a few query tokens of one sequence. Rows in which one pass cannot be sure (`ranking`) are listed per
key/value head, in any order since rows do not interact, and `_second_look` ranks them afresh, pass by pass.

M rows per tile, LANES lanes, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.geometry import (
    Geometry,
    cdiv,
    first_row,
    first_slot,
    locate,
    power_of_two,
    sequence_of,
    span,
    strides,
)
from openmoba.ops.triton.host.device import most_registers
from openmoba.ops.triton.host.launch import REMEMBERED, Launch
from openmoba.ops.triton.pool import pool
from openmoba.ops.triton.ranking import CENTER_BITS, largest_norms, load_scaled_rows, rank_once, rank_repeatedly

_KEPT = 3
_MOST_PICKS_OF_ONE_PASS = 16
_SECOND_LOOK_PROGRAMS = 264


@dataclass(frozen=True)
class GateTile:
    """M rows against tiles of 2 * `lanes` centroids; `registers` per thread at most."""

    m: int
    lanes: int
    warps: int
    stages: int
    registers: int | None = None

    def launch(self) -> dict[str, int]:
        """The kernels' keyword arguments."""
        sizes = {"M": self.m, "LANES": self.lanes, "num_warps": self.warps, "num_stages": self.stages}
        return sizes | most_registers(self.registers)


def choose(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    geometry: Geometry,
    out: Tensor,
    out_stride_head: int,
    out_stride_token: int,
    heads_per_sort: int,
) -> None:
    """Write the choice into `out`: sort keys, or block numbers within the sequence if `heads_per_sort` is 0."""
    centroids, norms = pool(k, cu_k, geometry)
    first, second = _launches(geometry, q.dtype, strides(q), out_stride_head, out_stride_token, heads_per_sort)
    again = count = None
    if second is not None:
        again = torch.empty((geometry.kv_heads, geometry.rows * geometry.group), dtype=torch.int32, device=q.device)
        count = torch.zeros(geometry.kv_heads, dtype=torch.int32, device=q.device)
    for launch in (first, second):
        if launch is not None:
            launch(q, centroids, norms, out, again, count, cu_q, cu_k)


@lru_cache(maxsize=REMEMBERED)
def _launches(
    geometry: Geometry,
    dtype: torch.dtype,
    q_strides: tuple[int, int, int],
    out_stride_head: int,
    out_stride_token: int,
    heads_per_sort: int,
) -> tuple[Launch, Launch | None]:
    """The gate, and the second look unless one pass is sure of every row."""
    tile = gate_tile(geometry, dtype)
    picks = geometry.top_k - 1
    per_lane = cdiv(geometry.longest - 1, tile.lanes)
    kept = max(1, min(_KEPT, picks, per_lane))
    complete = kept in (picks, per_lane) or per_lane == 0
    repeat = picks > _MOST_PICKS_OF_ONE_PASS
    group_part = min(geometry.group, tile.m)
    numbers = (
        geometry.sequences,
        geometry.tokens_q,
        geometry.tokens_k,
        geometry.block_size,
        geometry.block_slots,
        geometry.rows * geometry.group,
        heads_per_sort,
        *q_strides,
        out_stride_head,
        out_stride_token,
    )
    constants = {
        "PICKS": picks,
        "KEEP": kept,
        "GROUP": geometry.group,
        "WIDTH": geometry.width,
        "D": geometry.padded_width,
        "LOCAL": heads_per_sort == 0,
        "PACKED": geometry.packed,
    }
    passes = {
        "GROUP_PART": group_part,
        "ROUNDS": picks if complete else min(picks, _MOST_PICKS_OF_ONE_PASS),
        "COMPLETE": complete,
        "REPEAT": repeat,
    }
    grid = (geometry.query_slots(tile.m // group_part), geometry.kv_heads * cdiv(geometry.group, group_part))
    first = Launch(_gate, grid, numbers + _fixed_point(geometry, tile.lanes), constants | passes | tile.launch())
    if complete or repeat:
        return first, None
    tile = second_look_tile(geometry, dtype)
    grid = (cdiv(_SECOND_LOOK_PROGRAMS, geometry.kv_heads), geometry.kv_heads)
    return first, Launch(_second_look, grid, numbers + _fixed_point(geometry, tile.lanes), constants | tile.launch())


def gate_tile(geometry: Geometry, dtype: torch.dtype) -> GateTile:
    """Tile shapes of the gate; any choice is correct. At 128 registers two programs share a multiprocessor."""
    width = geometry.padded_width
    if dtype == torch.float32:
        return GateTile(m=64, lanes=32 if width <= 64 else 16, warps=8, stages=1)
    if width > 128:
        return GateTile(m=64, lanes=32, warps=8, stages=1)
    if geometry.top_k > 9:
        return GateTile(m=64, lanes=64, warps=8, stages=1)
    return GateTile(m=128, lanes=32, warps=8, stages=3, registers=128)


def second_look_tile(geometry: Geometry, dtype: torch.dtype) -> GateTile:
    """Tile shapes of the second look; any choice is correct."""
    tile = gate_tile(geometry, dtype)
    return GateTile(m=64, lanes=min(32, tile.lanes), warps=8, stages=min(2, tile.stages))


def _fixed_point(geometry: Geometry, lanes: int) -> tuple[float, int, int]:
    """Scale of the payload, range of the index, and what to subtract so that keys start at 0 (`ranking`)."""
    tiles = 2 * cdiv(geometry.longest, 2 * lanes)
    index_range = power_of_two(tiles)
    payload_bits = min(22, 31 - (index_range * lanes - 1).bit_length())
    half = 2 ** (payload_bits - 1)
    index_base = ((CENTER_BITS - half) * index_range + 2**31) % 2**32 - 2**31  # wraps, as the kernel does
    # Rounding in the score and in both norms stays below 1 / 1024.
    return (half - 2) * (1 - 2**-10), index_range, index_base


@triton.jit
def _gate(
    q_ptr,
    centroid_ptr,
    norm_ptr,
    out_ptr,
    again_ptr,
    count_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    block_slots,
    rows,
    heads_per_sort,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_oh,
    stride_ot,
    key_scale,
    index_range,
    index_base,
    PICKS: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    LOCAL: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP_PART: tl.constexpr,
    ROUNDS: tl.constexpr,
    COMPLETE: tl.constexpr,
    REPEAT: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
):
    """Rank the blocks of one tile: M // GROUP_PART query tokens of one sequence, and GROUP_PART heads of a group."""
    PARTS: tl.constexpr = (GROUP + GROUP_PART - 1) // GROUP_PART
    TOKENS: tl.constexpr = M // GROUP_PART
    # Late tiles have the most blocks to score: they start first.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // PARTS
    sequence, tile = locate(slot, cu_q_ptr, sequences, tokens_q, TOKENS, PACKED)
    begin_q, length_q = span(sequence, cu_q_ptr, tokens_q, PACKED)
    _, length_k = span(sequence, cu_k_ptr, tokens_k, PACKED)
    if tile * TOKENS >= length_q:
        return
    row_M = tl.arange(0, M)
    token_M = tile * TOKENS + row_M // GROUP_PART
    member_M = tl.program_id(1) % PARTS * GROUP_PART + row_M % GROUP_PART
    live_M = (token_M < length_q) & (row_M < TOKENS * GROUP_PART) & (member_M < GROUP)
    past_M = (token_M + length_k - length_q) // block_size
    last_token = tl.minimum((tile + 1) * TOKENS, length_q) - 1
    fewest = (tile * TOKENS + length_k - length_q) // block_size
    most = (last_token + length_k - length_q) // block_size

    q_offset_M = (begin_q + token_M).to(tl.int64) * stride_qt + (head * GROUP + member_M).to(tl.int64) * stride_qh
    q_offset_M += tl.cast(sequence, tl.int64) * stride_qb
    DTYPE: tl.constexpr = centroid_ptr.dtype.element_ty
    first_flat = first_row(sequence, cu_q_ptr, tokens_q, PACKED) + tile * TOKENS
    out_ptr += head.to(tl.int64) * stride_oh + tl.cast(first_flat, tl.int64) * stride_ot
    out_M = row_M // GROUP_PART * stride_ot + member_M * PICKS
    start = first_slot(sequence, cu_k_ptr, tokens_k, block_size, PACKED)
    first = head * block_slots + start
    offset = 0 if LOCAL else head % heads_per_sort * block_slots + start
    none = -1 if LOCAL else heads_per_sort * block_slots
    largest_M = largest_norms(norm_ptr + first, past_M, fewest, most)
    q_MD, scale_M = load_scaled_rows(q_ptr, q_offset_M, live_M, largest_M, key_scale, DTYPE, WIDTH, D)
    centroid_ptr += tl.cast(first, tl.int64) * D
    if REPEAT:
        rank_repeatedly(
            q_MD, scale_M, past_M, live_M, fewest, most, centroid_ptr, out_ptr + out_M, offset, none,
            index_range, index_base, PICKS, ROUNDS, KEEP, LANES, COMPLETE,
        )  # fmt: skip
    else:
        block_ML, again_M = rank_once(
            q_MD, scale_M, past_M, fewest, most, centroid_ptr, index_range, index_base, PICKS, KEEP, LANES, COMPLETE
        )
        lane_L = tl.arange(0, LANES)[None, :]
        value_ML = tl.where(block_ML < 0, none, offset + block_ML).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (out_M[:, None] + lane_L), value_ML, mask=live_M[:, None] & (lane_L < PICKS))
        if not COMPLETE:
            again_M = again_M & live_M
            at_M = tl.atomic_add(count_ptr + head + tl.zeros([M], tl.int32), 1, mask=again_M, sem="relaxed")
            list_ptr = again_ptr + head.to(tl.int64) * rows
            tl.store(list_ptr + at_M, (first_flat + row_M // GROUP_PART) * GROUP + member_M, mask=again_M)


@triton.jit
def _second_look(
    q_ptr,
    centroid_ptr,
    norm_ptr,
    out_ptr,
    again_ptr,
    count_ptr,
    cu_q_ptr,
    cu_k_ptr,
    sequences,
    tokens_q,
    tokens_k,
    block_size,
    block_slots,
    rows,
    heads_per_sort,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_oh,
    stride_ot,
    key_scale,
    index_range,
    index_base,
    PICKS: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    LOCAL: tl.constexpr,
    PACKED: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
):
    """Rank the listed rows again, in tiles of M gathered rows, with as many passes as they need."""
    head = tl.program_id(1)
    count = tl.load(count_ptr + head)
    list_ptr = again_ptr + head.to(tl.int64) * rows
    for tile in range(tl.program_id(0), tl.cdiv(count, M), tl.num_programs(0)):
        at_M = tile * M + tl.arange(0, M)
        listed_M = at_M < count
        # Surplus rows repeat the last one, which widens no range.
        row_M = tl.load(list_ptr + tl.minimum(at_M, count - 1))
        flat_M = row_M // GROUP
        member_M = row_M % GROUP
        sequence_M = sequence_of(flat_M, cu_q_ptr, sequences, tokens_q, PACKED)
        out_M = out_ptr + head.to(tl.int64) * stride_oh + flat_M.to(tl.int64) * stride_ot + member_M * PICKS
        for sequence in range(tl.min(sequence_M, 0), tl.max(sequence_M, 0) + 1):
            live_M = listed_M & (sequence_M == sequence)
            begin_q, length_q = span(sequence, cu_q_ptr, tokens_q, PACKED)
            _, length_k = span(sequence, cu_k_ptr, tokens_k, PACKED)
            token_M = flat_M - first_row(sequence, cu_q_ptr, tokens_q, PACKED)
            past_M = tl.where(live_M, (token_M + length_k - length_q) // block_size, 0)
            most = tl.max(past_M, 0)
            fewest = tl.min(tl.where(live_M, past_M, most), 0)
            q_offset_M = (begin_q + token_M).to(tl.int64) * stride_qt + (head * GROUP + member_M).to(
                tl.int64
            ) * stride_qh
            q_offset_M += tl.cast(sequence, tl.int64) * stride_qb
            DTYPE: tl.constexpr = centroid_ptr.dtype.element_ty
            start = first_slot(sequence, cu_k_ptr, tokens_k, block_size, PACKED)
            first = head * block_slots + start
            offset = 0 if LOCAL else head % heads_per_sort * block_slots + start
            none = -1 if LOCAL else heads_per_sort * block_slots
            largest_M = largest_norms(norm_ptr + first, past_M, fewest, most)
            q_MD, scale_M = load_scaled_rows(q_ptr, q_offset_M, live_M, largest_M, key_scale, DTYPE, WIDTH, D)
            rank_repeatedly(
                q_MD, scale_M, past_M, live_M, fewest, most, centroid_ptr + tl.cast(first, tl.int64) * D,
                out_M, offset, none, index_range, index_base, PICKS, PICKS, KEEP, LANES, False,
            )  # fmt: skip
