"""Gate: rank the past blocks of every row in one pass, and of some rows again.

A *row* is (query token, query head of one key/value head's group); a group shares its centroids. A tile of the gate
holds the rows of a few query tokens of one sequence. Rows in which one pass cannot be sure (`ranking`) are listed per
key/value head, in any order since rows do not interact, and `_second_look` ranks them afresh, pass by pass.

M rows per tile, LANES lanes, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.arguments import Call, Rows
from openmoba.ops.triton.geometry import (
    Geometry,
    cdiv,
    first_row,
    first_tile_slot,
    locate,
    power_of_two,
    sequence_of,
    span,
    strides,
)
from openmoba.ops.triton.host.device import most_registers
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
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
        """Return the kernels' keyword arguments."""
        sizes = {"M": self.m, "LANES": self.lanes, "num_warps": self.warps, "num_stages": self.stages}
        return sizes | most_registers(self.registers)


class Centroids(NamedTuple):
    """Centroids `[Hkv, block_slots, D]` and their norms (`pool`)."""

    ptr: Any
    norms: Any


class Choice(NamedTuple):
    """Where the choice is written: an address, and strides of key/value heads and query tokens."""

    ptr: Any
    head: int
    token: int


class Again(NamedTuple):
    """Rows for the second look, `[Hkv, rows]`, and how many there are of each key/value head."""

    rows: Any
    lengths: Any


class FixedPoint(NamedTuple):
    """How a score becomes a sort key (`ranking`): the payload's scale, the index' range, and where they begin."""

    payload_scale: float
    index_range: int
    index_base: int


def choose(
    q: Tensor,
    pooled: tuple[Tensor, Tensor],
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    geometry: Geometry,
    out: Tensor,
    out_stride_head: int,
    out_stride_token: int,
    heads_per_sort: int,
) -> None:
    """Write the choice into `out`: sort keys, or block numbers within the sequence if `heads_per_sort` is 0.

    `pooled` as `pool` returns it.
    """
    centroids, norms = pooled
    first, second = _launches(geometry, q.dtype, strides(q), out_stride_head, out_stride_token, heads_per_sort)
    again = lengths = None
    if second is not None:
        again = torch.empty((geometry.kv_heads, geometry.rows), dtype=torch.int32, device=q.device)
        lengths = torch.zeros(geometry.kv_heads, dtype=torch.int32, device=q.device)
    for launch in (first, second):
        if launch is not None:
            launch(q, centroids, norms, out, again, lengths, cu_q, cu_k)


@lru_cache(maxsize=REMEMBERED)
def _launches(
    geometry: Geometry,
    dtype: torch.dtype,
    q_strides: tuple[int, int, int],
    out_stride_head: int,
    out_stride_token: int,
    heads_per_sort: int,
) -> tuple[Launch, Launch | None]:
    """Return the gate, and the second look unless one pass is sure of every row."""
    tile = gate_tile(geometry, dtype)
    picks = geometry.top_k - 1
    per_lane = cdiv(geometry.longest - 1, tile.lanes)
    kept = max(1, min(_KEPT, picks, per_lane))
    complete = kept in (picks, per_lane) or per_lane == 0
    repeat = picks > _MOST_PICKS_OF_ONE_PASS
    group_part = min(geometry.group, tile.m)
    written = Choice(TENSOR, out_stride_head, out_stride_token)
    inputs = (Rows.of(q_strides), Centroids(TENSOR, TENSOR), written, Again(TENSOR, TENSOR), Call.of(geometry))
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
    grid = (geometry.query_tile_slots(tile.m // group_part), geometry.kv_heads * cdiv(geometry.group, group_part))
    arguments = (*inputs, heads_per_sort, _fixed_point(geometry, tile.lanes))
    first = Launch(_gate, grid, arguments, constants | passes | tile.launch())
    if complete or repeat:
        return first, None
    tile = second_look_tile(geometry, dtype)
    grid = (cdiv(_SECOND_LOOK_PROGRAMS, geometry.kv_heads), geometry.kv_heads)
    arguments = (*inputs, heads_per_sort, _fixed_point(geometry, tile.lanes))
    return first, Launch(_second_look, grid, arguments, constants | tile.launch())


def gate_tile(geometry: Geometry, dtype: torch.dtype) -> GateTile:
    """Choose the gate's tile; any choice is correct. At 128 registers two programs share a multiprocessor."""
    width = geometry.padded_width
    if dtype == torch.float32:
        return GateTile(m=64, lanes=32 if width <= 64 else 16, warps=8, stages=1)
    if width > 128:
        return GateTile(m=64, lanes=32, warps=8, stages=1)
    if geometry.top_k > 9:
        return GateTile(m=64, lanes=64, warps=8, stages=1)
    return GateTile(m=128, lanes=32, warps=8, stages=3, registers=128)


def second_look_tile(geometry: Geometry, dtype: torch.dtype) -> GateTile:
    """Choose the second look's tile; any choice is correct."""
    tile = gate_tile(geometry, dtype)
    return GateTile(m=64, lanes=min(32, tile.lanes), warps=8, stages=min(2, tile.stages))


def _fixed_point(geometry: Geometry, lanes: int) -> FixedPoint:
    tiles = 2 * cdiv(geometry.longest, 2 * lanes)
    index_range = power_of_two(tiles)
    payload_bits = min(22, 31 - (index_range * lanes - 1).bit_length())
    half = 2 ** (payload_bits - 1)
    index_base = ((CENTER_BITS - half) * index_range + 2**31) % 2**32 - 2**31  # wraps, as the kernel does
    # Rounding in the score and in both norms stays below 1 / 1024.
    return FixedPoint((half - 2) * (1 - 2**-10), index_range, index_base)


@triton.jit
def _gate(
    q, centroids, out, again, call, heads_per_sort, fixed,
    PICKS: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, GROUP_PART: tl.constexpr, ROUNDS: tl.constexpr, COMPLETE: tl.constexpr,
    REPEAT: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rank the blocks of one tile: M // GROUP_PART query tokens of one sequence, and GROUP_PART heads of a group."""
    PARTS: tl.constexpr = (GROUP + GROUP_PART - 1) // GROUP_PART
    TOKENS: tl.constexpr = M // GROUP_PART
    # Late tiles have the most blocks to score: they start first.
    tile_slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // PARTS
    sequence, tile = locate(tile_slot, call.cu_q, call.sequences, call.tokens_q, TOKENS, PACKED)
    begin_q, length_q = span(sequence, call.cu_q, call.tokens_q, PACKED)
    _, length_k = span(sequence, call.cu_k, call.tokens_k, PACKED)
    if tile * TOKENS >= length_q:
        return
    # The heads of a group share centroids, so a tile has all of them, and fewer tokens; where a group does not divide
    # M, or is split over several programs, some rows are nobody's.
    row_M = tl.arange(0, M)
    token_M = tile * TOKENS + row_M // GROUP_PART
    member_M = tl.program_id(1) % PARTS * GROUP_PART + row_M % GROUP_PART
    live_M = (token_M < length_q) & (row_M < TOKENS * GROUP_PART) & (member_M < GROUP)
    # Rows of a tile differ in how many blocks they have before them: those that all of them have are scored unmasked.
    past_M = (token_M + length_k - length_q) // call.block_size
    last_token = tl.minimum((tile + 1) * TOKENS, length_q) - 1
    fewest = (tile * TOKENS + length_k - length_q) // call.block_size
    most = (last_token + length_k - length_q) // call.block_size

    q_offset_M = (begin_q + token_M).to(tl.int64) * q.token + (head * GROUP + member_M).to(tl.int64) * q.head
    q_offset_M += tl.cast(sequence, tl.int64) * q.batch
    DTYPE: tl.constexpr = centroids.ptr.dtype.element_ty
    # What is written: block slots, counted through the heads that are sorted together, so that one sort of one integer
    # brings the pairs into the order of lists; or, for whoever asks which blocks, numbers within the sequence (LOCAL).
    first_flat = first_row(sequence, call, PACKED) + tile * TOKENS
    out_ptr = out.ptr + head.to(tl.int64) * out.head + tl.cast(first_flat, tl.int64) * out.token
    out_M = row_M // GROUP_PART * out.token + member_M * PICKS
    start = first_tile_slot(sequence, call.cu_k, call.tokens_k, call.block_size, PACKED)
    first = head * call.block_slots + start
    offset = 0 if LOCAL else head % heads_per_sort * call.block_slots + start
    none = -1 if LOCAL else heads_per_sort * call.block_slots
    # The range of the fixed point has to be known before the first score is: a bound by the norms costs one pass over
    # these, where the largest score would cost one over all centroids.
    largest_M = largest_norms(centroids.norms + first, past_M, fewest, most)
    q_MD, scale_M = load_scaled_rows(q.ptr, q_offset_M, live_M, largest_M, fixed.payload_scale, DTYPE, WIDTH, D)
    centroid_ptr = centroids.ptr + tl.cast(first, tl.int64) * D
    # Many picks may not fit in a row's lanes: they are stored one by one, in as many passes as it takes. Few are ranked
    # in one pass, and the rows that it may be wrong about are listed for `_second_look`, whose tiles are full of them.
    if REPEAT:
        rank_repeatedly(
            q_MD, scale_M, past_M, live_M, fewest, most, centroid_ptr, out_ptr + out_M, offset, none,
            fixed, PICKS, ROUNDS, KEEP, LANES, COMPLETE,
        )  # fmt: skip
    else:
        block_ML, again_M = rank_once(
            q_MD, scale_M, past_M, fewest, most, centroid_ptr, fixed, PICKS, KEEP, LANES, COMPLETE
        )
        lane_L = tl.arange(0, LANES)[None, :]
        value_ML = tl.where(block_ML < 0, none, offset + block_ML).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (out_M[:, None] + lane_L), value_ML, mask=live_M[:, None] & (lane_L < PICKS))
        if not COMPLETE:
            # The list's order differs from run to run; what is written for its rows does not depend on it.
            again_M = again_M & live_M
            at_M = tl.atomic_add(again.lengths + head + tl.zeros([M], tl.int32), 1, mask=again_M, sem="relaxed")
            again_ptr = again.rows + head.to(tl.int64) * call.rows
            tl.store(again_ptr + at_M, (first_flat + row_M // GROUP_PART) * GROUP + member_M, mask=again_M)


@triton.jit
def _second_look(
    q, centroids, out, again, call, heads_per_sort, fixed,
    PICKS: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rank the listed rows again, in tiles of M gathered rows, with as many passes as they need."""
    head = tl.program_id(1)
    length = tl.load(again.lengths + head)
    again_ptr = again.rows + head.to(tl.int64) * call.rows
    for tile in range(tl.program_id(0), tl.cdiv(length, M), tl.num_programs(0)):
        at_M = tile * M + tl.arange(0, M)
        listed_M = at_M < length
        # Surplus rows repeat the last one, which widens no range.
        row_M = tl.load(again_ptr + tl.minimum(at_M, length - 1))
        flat_M = row_M // GROUP
        member_M = row_M % GROUP
        sequence_M = sequence_of(flat_M, call, PACKED)
        out_M = out.ptr + head.to(tl.int64) * out.head + flat_M.to(tl.int64) * out.token + member_M * PICKS
        # Rows of several sequences may meet in a tile, and each sequence has centroids of its own: one after the other.
        for sequence in range(tl.min(sequence_M, 0), tl.max(sequence_M, 0) + 1):
            live_M = listed_M & (sequence_M == sequence)
            begin_q, length_q = span(sequence, call.cu_q, call.tokens_q, PACKED)
            _, length_k = span(sequence, call.cu_k, call.tokens_k, PACKED)
            token_M = flat_M - first_row(sequence, call, PACKED)
            past_M = tl.where(live_M, (token_M + length_k - length_q) // call.block_size, 0)
            # Rows of other sequences must not widen the range of blocks that is scored.
            most = tl.max(past_M, 0)
            fewest = tl.min(tl.where(live_M, past_M, most), 0)
            q_offset_M = (begin_q + token_M).to(tl.int64) * q.token + (head * GROUP + member_M).to(tl.int64) * q.head
            q_offset_M += tl.cast(sequence, tl.int64) * q.batch
            DTYPE: tl.constexpr = centroids.ptr.dtype.element_ty
            start = first_tile_slot(sequence, call.cu_k, call.tokens_k, call.block_size, PACKED)
            first = head * call.block_slots + start
            offset = 0 if LOCAL else head % heads_per_sort * call.block_slots + start
            none = -1 if LOCAL else heads_per_sort * call.block_slots
            # A row's bound depends on its own blocks alone, whatever rows stand beside it.
            largest_M = largest_norms(centroids.norms + first, past_M, fewest, most)
            q_MD, scale_M = load_scaled_rows(q.ptr, q_offset_M, live_M, largest_M, fixed.payload_scale, DTYPE, WIDTH, D)
            rank_repeatedly(
                q_MD, scale_M, past_M, live_M, fewest, most, centroids.ptr + tl.cast(first, tl.int64) * D,
                out_M, offset, none, fixed, PICKS, PICKS, KEEP, LANES, False,
            )  # fmt: skip
