"""Plan: turn "which blocks does a row read" into "which rows read this block", and cut the lists into items.

A *row* is a (query token, query head) of one key/value head, a *pair* is (row, rank of one of its past blocks),
numbered `row * past + rank`. Every block gets its list of pairs in ascending order, so that sums over a list have one
order and repeat bit for bit: by a stable sort of the pairs by block or, where there are few, by one program per list
that looks through all of them, once to count and once to place, which takes two launches instead of ten. Lists differ
in length; work is handed out in *items* of at most `segment` pairs, those of the last lists longest first, so that the
multiprocessors finish together. The number of items depends on the choice, which stays on the device, so kernels are
launched for the most there can be and the surplus programs return at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from openmoba.ops.triton.geometry import Geometry, cdiv, locate, span
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch

_LANES = 128
_SORTED = 256  # lists; those before keep their order, in which neighbours read the same rows
_COPIED = 1024
_LOOKED_AT = 1024
_MOST_LOOKS = 2**22  # of all lists of a head at pairs of their sequence: up to here placing takes less than sorting


@dataclass(frozen=True)
class Plan:
    """The lists of some key/value heads, which are worked on at once.

    Attributes:
        pairs: int32 `[heads * rows * group * past]`, pairs by (head, block slot), undefined outside the lists.
        offsets: int32 `[heads * (block_slots + 1)]`, where each list starts in `pairs`, and the head's end.
        heads: key/value heads in this plan.
        size: the most pairs that its lists can hold.
        skips: int32 `[block_slots]`, what to add to a place that `offsets` names; None: nothing (`split_plan`).
        counts: int32 `[heads * rows * group]`, how many past blocks a row reads; None: as many as it has, up to `past`.
    """

    pairs: Tensor
    offsets: Tensor
    heads: int
    size: int
    skips: Tensor | None = None
    counts: Tensor | None = None


def make_plan(sort_keys: Tensor, pairs: Tensor, offsets: Tensor, geometry: Geometry) -> Plan:
    """Invert the choice of some heads (`route.route`) into `pairs` and `offsets`, which it overwrites."""
    heads, block_slots = sort_keys.shape[0], geometry.block_slots
    size = pairs.numel()
    if size // heads // _sequences(geometry) * block_slots <= _MOST_LOOKS:
        lengths = torch.empty(heads * block_slots, dtype=torch.int32, device=sort_keys.device)
        count_pairs, place_pairs = _placing(geometry, heads)
        count_pairs(sort_keys, lengths)
        place_pairs(sort_keys, lengths, pairs, offsets)
    else:
        ordered, order = torch.sort(sort_keys.view(-1), stable=True)
        _writing(heads, block_slots, size)(ordered, order, pairs, offsets)
    return Plan(pairs, offsets, heads, size)


def _sequences(geometry: Geometry) -> int:
    """Return how many sequences' pairs are known to lie apart without their lengths."""
    return 1 if geometry.packed else geometry.sequences


@lru_cache(maxsize=REMEMBERED)
def _placing(geometry: Geometry, heads: int) -> tuple[Launch, Launch]:
    """Return the launches that count and place."""
    block_slots, pairs, sequences = geometry.block_slots, geometry.pairs, _sequences(geometry)
    token_pairs = 0 if geometry.packed else geometry.group * (geometry.top_k - 1)
    before = (geometry.tokens_k - geometry.tokens_q) * token_pairs
    numbers = (
        block_slots,
        pairs,
        block_slots // sequences,
        pairs // sequences,
        geometry.block_size * token_pairs,
        before,
    )
    constants = {"M": _LOOKED_AT, "num_warps": 4}
    count_pairs = Launch(_count_pairs, (block_slots, heads), (TENSOR, TENSOR, *numbers), constants)
    return count_pairs, Launch(
        _place_pairs, (block_slots + 1, heads), (*[TENSOR] * 4, *numbers), constants | {"LANES": _LANES}
    )


@lru_cache(maxsize=REMEMBERED)
def _writing(heads: int, block_slots: int, pairs: int) -> Launch:
    programs = max(cdiv(pairs, _COPIED), cdiv(heads * (block_slots + 1), _LANES))
    constants = {"COPIED": _COPIED, "LANES": _LANES}
    return Launch(_write_plan, (programs,), (*[TENSOR] * 4, heads, block_slots, pairs), constants)


def split_plan(plan: Plan | None, geometry: Geometry, tokens: int) -> Iterator[tuple[range, Plan | None]]:
    """Yield the plan by ranges of `tokens` query tokens (flat numbers); one head, unless there is one range.

    A list is in ascending order, so what it holds of a range is a stretch of it. Each range gets offsets as if these
    stretches lay one behind the other, and `skips` to where they are.
    """
    if plan is None or tokens >= geometry.query_tokens:
        yield range(geometry.query_tokens), plan
        return
    assert plan.heads == 1
    range_pairs = tokens * geometry.group * (geometry.top_k - 1)
    ranges, lists = cdiv(geometry.query_tokens, tokens), geometry.block_slots
    borders_RN = torch.empty((ranges + 1, lists), dtype=torch.int32, device=plan.pairs.device)
    _bordering(ranges, lists, plan.size, range_pairs)(plan.pairs, plan.offsets, borders_RN)
    offsets_RN = pad(borders_RN.diff(dim=0).cumsum(1, dtype=torch.int32), (1, 0))
    skips_RN = borders_RN[:-1] - offsets_RN[:, :-1]
    for i, first in enumerate(range(0, geometry.query_tokens, tokens)):
        range_plan = replace(plan, offsets=offsets_RN[i], size=range_pairs, skips=skips_RN[i])
        yield range(first, min(first + tokens, geometry.query_tokens)), range_plan


@lru_cache(maxsize=REMEMBERED)
def _bordering(ranges: int, lists: int, pairs: int, range_pairs: int) -> Launch:
    arguments = (TENSOR, TENSOR, TENSOR, lists, pairs, range_pairs)
    return Launch(_find_borders, (ranges + 1, cdiv(lists, _LANES)), arguments, {"LANES": _LANES})


def make_items(plan: Plan, geometry: Geometry, segment: int) -> Tensor:
    """Return what each program works on, int32 `[items, 2]`: an item, and its list or -1.

    A list's number is `head * block_slots + block slot`. List b owns the items from `start // segment + b` on, as
    sequences own tile slots in `geometry`.
    """
    lists = plan.heads * geometry.block_slots
    size = most_items(plan.size, lists, segment)
    items = torch.empty((size, 2), dtype=torch.int32, device=plan.pairs.device)
    _ordering(lists, geometry.block_slots, size, segment)(plan.offsets, items)
    return items


def most_items(pairs: int, lists: int, segment: int) -> int:
    """Return the most items that lists of so many pairs can make."""
    return pairs // segment + lists


@lru_cache(maxsize=REMEMBERED)
def _ordering(lists: int, block_slots: int, items: int, segment: int) -> Launch:
    arguments = (TENSOR, TENSOR, lists, block_slots, items, segment)
    constants = {"LANES": _LANES, "SORTED": _SORTED, "num_warps": 8}
    return Launch(_order_items, (1 + cdiv(items, _LANES) * (lists > _SORTED),), arguments, constants)


@triton.jit
def list_bounds(offsets_ptr, list_id, block_slots):
    """Return the start and end of a list in `pairs`."""
    at = offsets_ptr + list_id + list_id // block_slots
    return tl.load(at), tl.load(at + 1)


@triton.jit
def item_bounds(items_ptr, offsets_ptr, program, block_slots, segment):
    """Return a program's item, its list, and its pairs' start and end (empty for a surplus program)."""
    item = tl.load(items_ptr + 2 * program)
    list_id = tl.load(items_ptr + 2 * program + 1)
    surplus = list_id < 0
    list_id = tl.where(surplus, 0, list_id)
    start, end = list_bounds(offsets_ptr, list_id, block_slots)
    begin = tl.where(surplus, end, start + (item - (start // segment + list_id)) * segment)
    return item, list_id, begin, tl.minimum(begin + segment, end)


@triton.jit
def skipped(begin, end, list_id, skips_ptr):
    """Return an item's bounds where they are in `pairs` (`Plan.skips`)."""
    if skips_ptr is not None:
        skip = tl.load(skips_ptr + list_id)
        begin += skip
        end += skip
    return begin, end


@triton.jit
def block_of_list(list_id, call, PACKED: tl.constexpr):
    """Return, of a list's block, its head within the plan, its sequence, and its first key in the batch row."""
    block_slot = list_id % call.block_slots
    sequence, block = locate(block_slot, call.cu_k, call.sequences, call.tokens_k, call.block_size, PACKED)
    key_begin, _ = span(sequence, call.cu_k, call.tokens_k, PACKED)
    return list_id // call.block_slots, sequence, key_begin + block * call.block_size


@triton.jit
def _choosing_pairs(block_slot, sequence_block_slots, sequence_pairs, block_pairs, pairs_before):
    """Return which pairs of a head may have chosen a block slot: of its sequence, of queries behind it.

    `block_pairs` are those of a block's queries, and `pairs_before` those of the keys before the first query, had they
    queries; both are 0 in a packed batch, where one stretch holds all sequences.
    """
    begin = block_slot // sequence_block_slots * sequence_pairs
    behind = tl.maximum((block_slot % sequence_block_slots + 1) * block_pairs - pairs_before, 0)
    return begin + behind, begin + sequence_pairs


@triton.jit
def _chose(sort_keys_ptr, at_M, end, wanted):
    """Return 1 where a pair's sort key is `wanted`, 0 elsewhere and from `end` on."""
    sort_key_M = tl.load(sort_keys_ptr + at_M, mask=at_M < end, other=-1).to(tl.int32)
    return (sort_key_M == wanted).to(tl.int32)


@triton.jit
def _count_pairs(
    sort_keys_ptr, lengths_ptr, block_slots, pairs, sequence_block_slots, sequence_pairs, block_pairs, pairs_before,
    M: tl.constexpr,
):  # fmt: skip
    """Count the pairs of one list."""
    block_slot = tl.program_id(0)
    head = tl.program_id(1)
    wanted = head * block_slots + block_slot
    # A block is chosen by later queries of its own sequence alone: in a batch half of these pairs need no look.
    begin, end = _choosing_pairs(block_slot, sequence_block_slots, sequence_pairs, block_pairs, pairs_before)
    found_M = tl.zeros([M], tl.int32)
    for at in tl.range(begin, end, M, num_stages=4):
        found_M += _chose(sort_keys_ptr + head * pairs, at + tl.arange(0, M), end, wanted)
    tl.store(lengths_ptr + wanted, tl.sum(found_M, 0))


@triton.jit
def _place_pairs(
    sort_keys_ptr, lengths_ptr, pairs_ptr, offsets_ptr, block_slots, pairs, sequence_block_slots, sequence_pairs,
    block_pairs, pairs_before,
    M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Place one list behind the head's lists before it, and its pairs. The last program writes the head's end."""
    block_slot = tl.program_id(0)
    head = tl.program_id(1)
    wanted = head * block_slots + block_slot
    # Every program adds up the lengths before its own: a scan by one program would be another launch to wait for.
    before_L = tl.zeros([LANES], tl.int32)
    for first in range(0, block_slot, LANES):
        list_L = first + tl.arange(0, LANES)
        before_L += tl.load(lengths_ptr + head * block_slots + list_L, mask=list_L < block_slot, other=0)
    start = head * pairs + tl.sum(before_L, 0)
    tl.store(offsets_ptr + head * (block_slots + 1) + block_slot, start)
    if block_slot == block_slots:
        return
    begin, end = _choosing_pairs(block_slot, sequence_block_slots, sequence_pairs, block_pairs, pairs_before)
    # In the order of their numbers, with a running sum instead of atomics: a list is the same in every run.
    for at in tl.range(begin, end, M, num_stages=4):
        at_M = at + tl.arange(0, M)
        here_M = _chose(sort_keys_ptr + head * pairs, at_M, end, wanted)
        tl.store(pairs_ptr + start + tl.cumsum(here_M, 0) - here_M, head * pairs + at_M, mask=here_M > 0)
        start += tl.sum(here_M, 0)


@triton.jit
def _write_plan(
    sort_keys_ptr, order_ptr, pairs_ptr, offsets_ptr, heads, block_slots, pairs,
    COPIED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write pairs = order, and offsets[h, b] = how many sort keys are below `h * block_slots + b`, by binary search."""
    at = tl.program_id(0) * COPIED + tl.arange(0, COPIED)
    tl.store(pairs_ptr + at, tl.load(order_ptr + at, mask=at < pairs, other=0).to(tl.int32), mask=at < pairs)
    if tl.program_id(0) * LANES >= heads * (block_slots + 1):
        return
    # Sort keys are in order, so a list begins where they reach its number. A head has one more offset than lists: its
    # end, which is the next head's beginning, so that a list's end is always the number behind its start.
    out = tl.program_id(0) * LANES + tl.arange(0, LANES)
    wanted = out - out // (block_slots + 1)
    low = tl.zeros([LANES], tl.int32)
    high = tl.zeros([LANES], tl.int32) + pairs
    span = pairs
    while span > 0:
        middle = (low + high) // 2
        open_ = low < high
        below = (tl.load(sort_keys_ptr + middle, mask=open_, other=0).to(tl.int32) < wanted) & open_
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        span = span // 2
    tl.store(offsets_ptr + out, low, mask=out < heads * (block_slots + 1))


@triton.jit
def _order_items(
    offsets_ptr, items_ptr, lists, block_slots, all_items, segment, LANES: tl.constexpr, SORTED: tl.constexpr
):
    """Order the items of the last SORTED lists by descending size, after those of the lists before in their order.

    An item `i` is of the last list b with `start(b) // segment + b <= i`, found by binary search.
    """
    first_sorted = tl.maximum(lists - SORTED, 0)
    first_start, _ = list_bounds(offsets_ptr, first_sorted, block_slots)
    first_place = first_start // segment + first_sorted
    # One program ranks the last lists, which needs no other's result; the rest finds its items meanwhile.
    if tl.program_id(0) == 0:
        _sort_items(offsets_ptr, items_ptr, first_sorted, first_place, lists, block_slots, all_items, segment, SORTED)
        return
    # Where an item's list is follows from its number alone, so that items need no scan over lists either.
    item = (tl.program_id(0) - 1) * LANES + tl.arange(0, LANES)
    low = tl.zeros([LANES], tl.int32)
    high = tl.zeros([LANES], tl.int32) + lists - 1
    span = lists
    while span > 0:
        middle = (low + high + 1) // 2
        start = tl.load(offsets_ptr + middle + middle // block_slots)
        reached = start // segment + middle <= item
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, tl.maximum(middle - 1, 0))
        span = span // 2
    _store_items(items_ptr, item, item, low, item < first_place)


@triton.jit
def _sort_items(
    offsets_ptr, items_ptr, first_sorted, first_place, lists, block_slots, all_items, segment, SORTED: tl.constexpr
):
    """Write whole segments first, then what is left of each list, the longest first, then none."""
    list_S = first_sorted + tl.arange(0, SORTED)
    start_S, end_S = list_bounds(offsets_ptr, tl.minimum(list_S, lists - 1), block_slots)
    length_S = tl.where(list_S < lists, end_S - start_S, 0)
    item_S = start_S // segment + list_S
    whole_S = length_S // segment
    rest_S = length_S % segment
    # Whole segments are the longest there are, and equal: they need no ranking.
    place_S = first_place + tl.cumsum(whole_S, 0) - whole_S
    for nth in range(tl.max(whole_S, 0)):
        _store_items(items_ptr, place_S + nth, item_S + nth, list_S, nth < whole_S)
    # Of equal lengths the earlier list comes first.
    order_S = rest_S * SORTED + (SORTED - 1 - tl.arange(0, SORTED))
    nth_S = tl.sum(((order_S[None, :] > order_S[:, None]) & (rest_S > 0)[None, :]).to(tl.int32), 1)
    first_rest = first_place + tl.sum(whole_S, 0)
    _store_items(items_ptr, first_rest + nth_S, item_S + whole_S, list_S, rest_S > 0)
    # The grid is for the most items there can be: what is left of it is told that there is nothing to do.
    first_surplus = first_rest + tl.sum((rest_S > 0).to(tl.int32), 0)
    for begin in range(first_surplus, all_items, SORTED):
        place_S = begin + tl.arange(0, SORTED)
        _store_items(items_ptr, place_S, place_S, tl.full([SORTED], -1, tl.int32), place_S < all_items)


@triton.jit
def _store_items(items_ptr, place, item, list_id, mask):
    tl.store(items_ptr + 2 * place, item, mask=mask)
    tl.store(items_ptr + 2 * place + 1, list_id, mask=mask)


@triton.jit
def _find_borders(pairs_ptr, offsets_ptr, borders_ptr, lists, pairs, range_pairs, LANES: tl.constexpr):
    """Write borders[r, b] = where in `pairs` list b reaches pair number r * range_pairs, by binary search."""
    list_id = tl.program_id(1) * LANES + tl.arange(0, LANES)
    exists = list_id < lists
    low = tl.load(offsets_ptr + list_id, mask=exists, other=0)
    high = tl.load(offsets_ptr + list_id + 1, mask=exists, other=0)
    span = pairs
    while span > 0:
        middle = (low + high) // 2
        open_ = low < high
        below = (tl.load(pairs_ptr + middle, mask=open_, other=0) < tl.program_id(0) * range_pairs) & open_
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        span = span // 2
    tl.store(borders_ptr + tl.program_id(0) * lists + list_id, low, mask=exists)
