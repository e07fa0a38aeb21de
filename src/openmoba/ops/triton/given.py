"""Given: blocks that the caller chose, as the sort keys that `route` makes of those it chooses itself.

A row may read fewer blocks than it was given: -1 is none, and a repeated block counts once. Those it reads come first,
in the order they were given in, so that its partial results lie side by side; how many they are is a *count* per row.

M rows per tile, L given blocks padded to a power of two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.arguments import Call
from openmoba.ops.triton.geometry import Geometry, cdiv, first_row, first_tile_slot, power_of_two, sequence_of, span
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.route import new_sort_keys

_TOGETHER = 1024  # given blocks of a tile


class GivenBlocks(NamedTuple):
    """Given blocks, `[batch, token, key/value head, query head of its group, place]`: an address, and strides."""

    ptr: Any
    batch: int
    token: int
    kv_head: int
    member: int
    place: int


def given_sort_keys(
    blocks: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, geometry: Geometry, heads_per_sort: int, counts: Tensor
) -> Tensor:
    """Return the sort keys of given blocks, as `route` has them, `[Hkv, rows * group, top_k - 1]`; write `counts`.

    Args:
        blocks: int32 `[..., H or Hkv, m]`, numbers within the sequence, in any order and with any strides. On a GPU the
            own block, a later one or one below -1 is asserted against on the device, and read by no row.
        geometry: of the call, where `top_k - 1` is not less than the different past blocks that a row can have.
        counts: int32 `[Hkv * rows * group]`.
    """
    sort_keys = new_sort_keys(geometry, heads_per_sort, blocks.device)
    _launch(geometry, tuple(blocks.shape[-2:]), blocks.stride(), heads_per_sort)(blocks, sort_keys, counts, cu_q, cu_k)
    return sort_keys


@lru_cache(maxsize=REMEMBERED)
def _launch(geometry: Geometry, shape: tuple[int, ...], strides: tuple[int, ...], heads_per_sort: int) -> Launch:
    heads, given = shape
    *batch, token, head, place = strides
    # One list for all query heads of a group, or one for each.
    kv_head, member = (head, 0) if heads == geometry.kv_heads else (head * geometry.group, head)
    rows, lanes = geometry.rows, power_of_two(given)
    m = max(1, _TOGETHER // lanes)
    given_blocks = GivenBlocks(TENSOR, batch[0] if batch else 0, token, kv_head, member, place)
    arguments = (given_blocks, TENSOR, TENSOR, Call.of(geometry), heads_per_sort)
    constants = {
        "GIVEN": given,
        "PAST": geometry.top_k - 1,
        "GROUP": geometry.group,
        "PACKED": geometry.packed,
        "M": m,
        "L": lanes,
        "num_warps": 4,
        # What makes the compiler keep assertions, but not those it would add itself.
        "debug": True,
        "sanitize_overflow": False,
    }
    return Launch(_sort_given, (cdiv(rows, m), geometry.kv_heads), arguments, constants)


@triton.jit(do_not_specialize_on_alignment=["counts_ptr"])
def _sort_given(
    blocks, sort_keys_ptr, counts_ptr, call, heads_per_sort,
    GIVEN: tl.constexpr, PAST: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Write the blocks that M rows of a key/value head read, each once, in front of none; and how many they are."""
    head = tl.program_id(1)
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    exists_M = row_M < call.rows
    flat_M = tl.where(exists_M, row_M // GROUP, 0)
    sequence_M = sequence_of(flat_M, call, PACKED)
    begin_q, length_q = span(sequence_M, call.cu_q, call.tokens_q, PACKED)
    _, length_k = span(sequence_M, call.cu_k, call.tokens_k, PACKED)
    token_M = flat_M - first_row(sequence_M, call, PACKED)
    own_M = (token_M + length_k - length_q) // call.block_size

    # A group of one list reads it once per query head, by a stride of zero: nothing is copied on the host.
    at_M = sequence_M.to(tl.int64) * blocks.batch + (begin_q + token_M).to(tl.int64) * blocks.token
    at_M += head.to(tl.int64) * blocks.kv_head + (row_M % GROUP).to(tl.int64) * blocks.member
    place_L = tl.arange(0, L)
    at_ML = at_M[:, None] + place_L.to(tl.int64)[None, :] * blocks.place
    block_ML = tl.load(blocks.ptr + at_ML, mask=exists_M[:, None] & (place_L < GIVEN)[None, :], other=-1)
    tl.device_assert((block_ML >= -1) & (block_ML < own_M[:, None]), "blocks must name past blocks, or -1 for none")

    # What is asserted against is left out as well: where assertions are off, no row reads what it must not. Of equal
    # blocks the first stays, in the order that the caller gave. They are loaded again, one place after the other, since
    # comparing all with all would take M x L x L registers.
    reads_ML = (block_ML >= 0) & (block_ML < own_M[:, None])
    for place in range(GIVEN - 1):
        before_M = tl.load(blocks.ptr + at_M + tl.cast(place, tl.int64) * blocks.place, mask=exists_M, other=-1)
        reads_ML = reads_ML & ((place_L <= place)[None, :] | (block_ML != before_M[:, None]))
    reading_ML = reads_ML.to(tl.int32)
    count_M = tl.sum(reading_ML, 1)
    rank_ML = tl.cumsum(reading_ML, 1) - reading_ML
    # What is read stands in front, none behind: its sort key comes after those of all lists, so that it is in no list.
    block_slot_M = first_tile_slot(sequence_M, call.cu_k, call.tokens_k, call.block_size, PACKED)
    block_slot_M += head % heads_per_sort * call.block_slots
    sort_keys_ptr += (head.to(tl.int64) * call.rows + row_M)[:, None] * PAST
    DTYPE: tl.constexpr = sort_keys_ptr.dtype.element_ty
    tl.store(sort_keys_ptr + rank_ML, (block_slot_M[:, None] + block_ML).to(DTYPE), mask=reads_ML)
    none = tl.full([M, L], heads_per_sort * call.block_slots, tl.int32).to(DTYPE)
    absent_ML = (place_L[None, :] >= count_M[:, None]) & (place_L < PAST)[None, :]
    tl.store(sort_keys_ptr + place_L[None, :], none, mask=exists_M[:, None] & absent_ML)
    tl.store(counts_ptr + head.to(tl.int64) * call.rows + row_M, count_M, mask=exists_M)
