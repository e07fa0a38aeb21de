"""The mask that transformers hands to MoBA: which sequence every key slot belongs to.

transformers' masks say which key each query may read; MoBA needs to know where the sequences begin, because
blocks restart there. So the mask registered under the name "moba" is an int32 *segment map* `[B, 1, 1, S]`
over the key slots of every batch row:

    -1  not written yet (the free end of a static cache)
     0  padding
     n  a token of the row's n-th sequence, n >= 1

    left padding      0 0 1 1 1 1        packed by position_ids    1 1 1 2 2 3
    static cache      0 1 1 1 -1 -1      hole in the middle        1 1 0 0 1 1

Queries are the last written slots. Two shorter forms say what needs no map:

    [B, 1, 1, 0]        rows of one whole sequence each, as None does
    [1, 1, n + 1, 1]    boundaries of n packed sequences, without padding, in the flattened batch

All are four-dimensional since transformers passes such masks through untouched, and int32 so that they are never
mistaken for a custom mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from openmoba.hf.support import windows_are_idle
from openmoba.ops.decode import MAX_QUERIES

UNWRITTEN, PADDING = -1, 0
TOKENS_PER_SEQUENCE = 16
"""In a graph there is room for the boundaries of so many sequences as if each had this many tokens."""

_HOLES = "with a static cache, padding must be on the left"
_ANOTHER_MASK = "a mask that is not causal over whole sequences; use attn_implementation='sdpa'"

# B batch, S key slots, T queries


def segment_map(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The segment map `[B, 1, 1, S]` or a shorter form of it, in transformers' signature for mask functions.

    Args:
        batch_size, q_length, kv_length: B, T and S; `q_offset` of the slots were written before.
        mask_function: transformers' predicate; plain causal, or causal within packed sequences.
        attention_mask: bool `[B, written slots]`, False for padding.
        local_size, use_vmap: set for sliding windows and for custom mask functions, which are refused.
        config: of the model; some make masks for windows that none of their layers has.

    Raises:
        ValueError: for a mask that is not causal over whole sequences.
    """
    if local_size is not None and windows_are_idle(config):
        return None
    if local_size is not None or kv_offset != 0:
        raise ValueError(
            f"MoBA has no sliding window or chunked attention, got a window of {local_size}; "
            "set the model configuration's sliding_window to None"
        )
    if use_vmap:
        raise ValueError(f"MoBA cannot combine with {_ANOTHER_MASK}")
    causal = mask_function is causal_mask_function
    if not causal and q_length != kv_length:
        raise ValueError(f"MoBA cannot combine with {_ANOTHER_MASK}")
    if not isinstance(q_offset, Tensor) and kv_length == q_offset + q_length:
        if causal and attention_mask is None:
            return None
        return _growing_map(None if causal else mask_function, attention_mask, batch_size, kv_length, device)
    map_BS = _padded(torch.ones(batch_size, kv_length, dtype=torch.int32, device=device), attention_mask)
    map_BS = map_BS.masked_fill(torch.arange(kv_length, device=device) >= q_offset + q_length, UNWRITTEN)
    first = attention_mask is not None and attention_mask.shape[-1] == q_length  # the cache was empty
    if torch.compiler.is_compiling() or (q_length <= MAX_QUERIES and not first):  # a step, which waits for nothing
        torch._assert_async(~has_holes(map_BS), _HOLES)
    elif bool(has_holes(map_BS)):
        raise ValueError(f"{_HOLES}: set the tokenizer's padding_side to 'left', or use a dynamic cache")
    return map_BS[:, None, None]


def visible_keys(segment_map: Tensor, queries: int) -> Tensor:
    """Which keys each of the last `queries` written slots may read, bool `[B, 1, T, S]`."""
    slot_S = torch.arange(segment_map.shape[-1], device=segment_map.device)
    written = (segment_map[0, 0, 0] != UNWRITTEN).sum()
    slot_T1 = (written - queries + torch.arange(queries, device=segment_map.device))[:, None]
    own_B1T1 = segment_map[..., 0, :].index_select(-1, slot_T1[:, 0])[..., None]
    return (segment_map > PADDING) & (segment_map == own_B1T1) & (slot_S <= slot_T1)


def has_holes(map_BS: Tensor) -> Tensor:
    """Whether padding follows a token in any row, bool scalar."""
    return ((map_BS[:, 1:] == PADDING) & (map_BS[:, :-1] > PADDING)).any()


def whole_rows(tokens: Tensor) -> Tensor:
    """The form that says that every row of `tokens` `[B, ...]` is one whole sequence."""
    return tokens.new_empty((tokens.shape[0], 1, 1, 0), dtype=torch.int32)


def boundaries(starts_BS: Tensor) -> Tensor:
    """The boundaries of sequences without padding, given where they start, bool; or the form for whole rows.

    Outside of graphs the device is waited for, once a batch. In a graph there is room for a fixed number of
    boundaries, the last ones of empty sequences; that there is room enough is asserted on the device.
    """
    if torch.compiler.is_compiling():
        return _fixed_boundaries(starts_BS)[None, None, :, None]
    start = starts_BS.flatten().nonzero()
    if len(start) == len(starts_BS):
        return whole_rows(starts_BS)
    ends = torch.nn.functional.pad(start.int(), (0, 0, 0, 1), value=starts_BS.numel())[None, None]
    torch._dynamo.maybe_mark_dynamic(ends, 2)
    return ends


def laid_out(map_BS: Tensor) -> Tensor:
    """The shortest form that says what a map of written slots says; in a graph, which cannot look, the map."""
    if not torch.compiler.is_compiling():
        least, most = torch.stack(map_BS.aminmax()).tolist() if map_BS.numel() else (1, 1)
        if least == most == 1:
            return whole_rows(map_BS)
        if least > PADDING:
            return boundaries(runs(map_BS))
    return map_BS[:, None, None]


def runs(map_BS: Tensor) -> Tensor:
    """Where a row begins or the map changes, bool `[B, S]`."""
    return torch.nn.functional.pad(map_BS[:, 1:] != map_BS[:, :-1], (1, 0), value=True)


def whole_runs(map_BS: Tensor) -> Tensor:
    """Boundaries of the sequences and of the padding between them, int32, without looking at the map's values.

    Only for graphs: a sequence with padding inside, which is two runs, fails an assertion on the device.
    """
    highest_BS = map_BS.cummax(-1).values
    reopened_BS = runs(map_BS)[:, 1:] & (map_BS[:, 1:] > PADDING) & (map_BS[:, 1:] <= highest_BS[:, :-1])
    torch._assert_async(~reopened_BS.any(), "in a compiled model, padding must not lie within a sequence")
    return _fixed_boundaries(runs(map_BS))


def _fixed_boundaries(starts_BS: Tensor) -> Tensor:
    """Boundaries of at most a fixed number of sequences, int32; those that are missing are empty, at the end."""
    tokens = starts_BS.numel()
    room = tokens // TOKENS_PER_SEQUENCE + starts_BS.shape[0]
    number_N = starts_BS.flatten().cumsum(0)
    torch._assert_async(
        number_N[-1] <= room,
        f"in a compiled model, packed sequences must have {TOKENS_PER_SEQUENCE} tokens on average; give cu_seq_lens_q "
        "and cu_seq_lens_k instead, or compile layer by layer",
    )
    # Every start writes itself to its place, everything else to one place behind them.
    place_N = torch.where(starts_BS.flatten(), number_N - 1, room + 1).clamp(max=room + 1)
    slot_N = torch.arange(tokens, dtype=torch.int32, device=starts_BS.device)
    ends = torch.full((room + 2,), tokens, dtype=torch.int32, device=starts_BS.device)
    return ends.scatter(0, place_N, slot_N)[:-1]


def _growing_map(
    mask_function: Callable[..., Tensor] | None,
    attention_mask: Tensor | None,
    batch: int,
    slots: int,
    device: torch.device | str,
) -> Tensor:
    """The map where all slots are written, or a shorter form of it."""
    map_BS = torch.ones(batch, slots, dtype=torch.int32, device=device)
    if mask_function is not None:
        map_BS = map_BS + _sequence_numbers(mask_function, batch, slots, device)
    return laid_out(_padded(map_BS, attention_mask))


def _padded(map_BS: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mark what `attention_mask` `[B, slots so far]` excludes."""
    if attention_mask is None:
        return map_BS
    slots = map_BS.shape[1]
    real_BS = torch.nn.functional.pad(attention_mask, (0, max(0, slots - attention_mask.shape[1])))
    return map_BS.masked_fill(~real_BS[:, :slots].bool(), PADDING)


def _sequence_numbers(
    mask_function: Callable[..., Tensor], batch: int, tokens: int, device: torch.device | str
) -> Tensor:
    """Number of the sequence each token belongs to, from 0, int32 `[B, T]`, read off transformers' predicate.

    Neighbours that do not see each other are in different sequences. The predicate must then be causal within
    these: no token sees the next one, every token sees its sequence's first.
    """
    row_B1 = torch.arange(batch, device=device)[:, None]
    slot_1T = torch.arange(tokens, device=device)[None]
    head = torch.zeros((), dtype=torch.long, device=device)
    past_1T, next_1T = slot_1T[:, :-1], slot_1T[:, 1:]
    joined_BT = mask_function(row_B1, head, next_1T, past_1T).expand(batch, -1)
    starts_BT = torch.nn.functional.pad(~joined_BT, (1, 0))
    first_BT = (slot_1T * starts_BT).cummax(-1).values
    sees_next = mask_function(row_B1, head, past_1T, next_1T).any()
    sees_first = mask_function(row_B1, head, slot_1T, first_BT).all()
    if torch.compiler.is_compiling():
        torch._assert_async(~sees_next & sees_first, f"MoBA cannot combine with {_ANOTHER_MASK}")
    elif bool(sees_next) or not bool(sees_first):
        raise ValueError(f"MoBA cannot combine with {_ANOTHER_MASK}")
    return starts_BT.cumsum(-1, dtype=torch.int32)
