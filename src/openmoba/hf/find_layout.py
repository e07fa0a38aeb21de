"""Finding out where the tokens of a batch's rows lie, before the first layer; `openmoba.hf.layout` is the answer.

Two ways lead here. The hook on the decoder sees all that the model was called with. It looks for positions that
restart, wherever they may be, and puts the answer in the place of the attention mask. transformers would look only
where there is neither a mask nor a cache, and wait for the device to do so. A batch without a mask and without
positions is known to be whole rows, and nothing is looked at.

    mask  positions  cache            what the hook hands on
    no    no         none             whole rows
    no    yes        none or empty    packed rows, or whole ones
    yes   yes        none or empty    a map, packed rows, or whole ones
    any   any        filled, static   the mask as it is, once the new positions are seen to go on

What the hook leaves as it is, transformers asks the mask function about, `layout_mask`: padding with a filled or static
cache, or without positions. `generate` asks it before the model is called at all, if that is compiled.

A sequence ends where positions do not go on by one, as in transformers; with a mask or a cache, where transformers
takes a jump ahead for part of one sequence, only where they do not rise.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import causal_mask_function

from openmoba.hf.layout import (
    PADDING,
    UNWRITTEN,
    Layout,
    mapped_rows,
    packed_rows,
    padding_follows,
    run_starts,
    whole_rows,
)
from openmoba.hf.settings import NAME
from openmoba.hf.support import windows_are_idle
from openmoba.hf.values import refuse
from openmoba.ops.decode import MAX_QUERIES
from openmoba.parallel.current import current_sharding

# B batch, T new tokens of a row, S key slots

Call = tuple[tuple[Any, ...], dict[str, Any]]

_ANOTHER_MASK = "MoBA cannot combine with a mask that is not causal over whole sequences"
_WAY_OUT = "use attn_implementation='sdpa'"


def attach_finder(decoder: nn.Module) -> None:
    """Install the hook on a decoder without its head, once."""
    if not any(isinstance(hook, _Finder) for hook in decoder._forward_pre_hooks.values()):
        names = tuple(signature(decoder.forward).parameters)
        # Models that place tokens in another way read the mask for it, so theirs has to stay as it is.
        rotary = any(name.endswith("rotary_emb") for name, _ in decoder.named_modules())
        decoder.register_forward_pre_hook(_Finder(names, rotary), with_kwargs=True)


class _Finder:
    """The hook. It knows the names of the decoder's arguments, and whether it may replace the mask."""

    def __init__(self, names: tuple[str, ...], rotary: bool) -> None:
        self.names, self.rotary = names, rotary

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if module.config._attn_implementation != NAME:
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        cache = next((x for x in inputs.values() if isinstance(x, Cache)), None)  # releases differ in its name
        # Found already, by kind of layer in some models, or refused by the attention function.
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return None
        tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if tokens is None:  # the model says itself what it misses
            return None
        if tokens.shape[1] == 0:
            raise ValueError("the model was given no tokens; give it one at least, such as the one that begins a text")
        if mask is not None and mask.shape[0] not in (1, tokens.shape[0]):
            raise ValueError(
                f"attention_mask has {mask.shape[0]} rows, and there are {tokens.shape[0]} of tokens; give each its own"
            )
        if current_sharding() is not None:
            _refuse_changing_rotation(module.config)
            return (), self._of_shard(inputs, tokens, mask, cache)
        given = inputs.get("cu_seq_lens_q") is not None or inputs.get("cu_seq_lens_k") is not None
        rows: Tensor | None = None
        if positions is None or given:
            rows = whole_rows(tokens) if mask is None and cache is None else None
        else:
            jumps = mask is None and cache is None and not self._caches(module, inputs)
            rows = _rows(positions.expand(tokens.shape[0], -1), mask, cache, jumps, self.rotary)
        return ((), inputs | {"attention_mask": rows}) if self.rotary and rows is not None else None

    def _of_shard(self, inputs: dict[str, Any], tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> Any:
        """Return the arguments for a part of every row: the sharding says where sequences begin."""
        if not self.rotary:
            raise ValueError("only models with rotary embeddings run on sequences that are split over processes")
        if mask is not None or cache is not None or inputs.get("position_ids") is None:
            raise ValueError(
                "a model on split sequences takes position_ids of the whole, and neither mask nor cache; cut the batch "
                "with openmoba.hf.shards.shard_inputs"
            )
        return inputs | {"attention_mask": whole_rows(tokens), "use_cache": False}

    @staticmethod
    def _caches(module: Any, inputs: dict[str, Any]) -> bool:
        use_cache = inputs.get("use_cache")
        return bool(module.config.use_cache if use_cache is None else use_cache)


def _refuse_changing_rotation(config: Any) -> None:
    """Raise ValueError for frequencies that follow the highest position at hand: processes would rotate differently."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    for kind in kinds & {"dynamic", "longrope"}:
        raise ValueError(
            f"rope_type={kind!r} rotates by the highest position that a process sees, which differs between processes "
            "that share a sequence; use 'yarn', 'llama3' or 'linear'"
        )


def boundaries_of_whole(tokens_BT: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Return where sequences, and padding between them, begin in the flattened batch, and where the last one ends.

    For rows that are to be split over processes, before they are: int32, None if every row is one sequence.

    Args:
        mask: padding `[B, T]`, False or 0 for padding.
        positions: `position_ids`, `[B or 1, T]`.

    Raises:
        ValueError: another mask, or padding between the tokens of a sequence.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens_BT.shape):
        raise ValueError(
            f"attention_mask of shape {tuple(getattr(mask, 'shape', ()))} cannot be split over processes; give a "
            f"padding mask of shape {tuple(tokens_BT.shape)}, or position_ids that restart at each sequence"
        )
    if positions is None:
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    rows = _rows(positions.expand(tokens_BT.shape), mask, None, mask is None, rotary=True)
    layout = Layout.read(rows, None, None, (tokens_BT.shape[0], tokens_BT.shape[1]))
    if layout.map is not None:
        layout.refuse_holes(
            "padding between the tokens of a sequence cannot be split over processes", "pad at its ends"
        )
        rows = packed_rows(run_starts(layout.map[:, 0, 0]))
        layout = Layout.read(rows, None, None, (layout.batch, layout.queries))
    return None if layout.cu_q is None else layout.cu_q.flatten()


def _rows(positions_BT: Tensor, mask: Tensor | None, cache: Cache | None, jumps: bool, rotary: bool) -> Tensor | None:
    """Return what takes the mask's place; None to leave it as it is.

    Args:
        mask: padding `[B, tokens so far]`, False or 0 for padding.
        jumps: whether a jump ahead begins another sequence.
        rotary: whether the mask may be replaced; if not, packed rows are refused.
    """
    new = positions_BT.shape[1]
    begun = cache is not None and not _empty(cache)
    if begun or not rotary or (mask is not None and mask.shape[1] != new):
        if new > 1:
            before = cache.get_seq_length() if cache is not None else 0
            _refuse_packed(_breaks(positions_BT, _new_part(mask, before, new), jumps=False).any())
        return None
    real_BT = None if mask is None else mask.bool()
    breaks_BT = _breaks(positions_BT, real_BT, jumps)
    if real_BT is None:
        return packed_rows(torch.cat([torch.ones_like(breaks_BT[:, :1]), breaks_BT[:, 1:]], 1))
    return mapped_rows((1 + breaks_BT.cumsum(-1, dtype=torch.int32)).masked_fill(~real_BT, PADDING))


def _breaks(positions_BT: Tensor, real_BT: Tensor | None, jumps: bool) -> Tensor:
    """Return where a token's position does not follow that of the last real token before it, bool `[B, T]`."""
    slot_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    last_BT = slot_T.expand(positions_BT.shape) if real_BT is None else torch.where(real_BT, slot_T, -1).cummax(-1)[0]
    before_BT = pad(last_BT[:, :-1], (1, 0), value=-1)
    step_BT = positions_BT - positions_BT.gather(1, before_BT.clamp(min=0))
    breaks_BT = (step_BT != 1 if jumps else step_BT <= 0) & (before_BT >= 0)
    return breaks_BT if real_BT is None else breaks_BT & real_BT


def _new_part(mask: Tensor | None, before: int | Tensor, new: int) -> Tensor | None:
    """Return which of the new tokens are real, bool `[B, T]`; None for all."""
    if mask is None:
        return None
    return mask.bool().index_select(1, before + torch.arange(new, device=mask.device))


def _refuse_packed(packed: Tensor) -> None:
    refuse(
        packed,
        "position_ids restart within a row that a cache goes on from, that fills a static cache, or whose model has no "
        "rotary embeddings to tell packed sequences apart",
        "give every sequence a row of its own, or, with rotary embeddings, run the packed batch with use_cache=False",
        wait=packed.device.type == "cpu",
    )


def _empty(cache: Cache) -> bool:
    """Return whether a cache holds nothing yet and grows; what a static cache holds, the host does not look at."""
    return isinstance(cache, DynamicCache) and cache.get_seq_length() == 0


def layout_mask(
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
    """Return a form of layout, None for whole rows, in transformers' signature for mask functions.

    Args:
        batch_size, q_length, kv_length: B, T and S; `q_offset` of the slots were written before.
        mask_function: transformers' predicate; has to be causal.
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
    if use_vmap or (mask_function is not causal_mask_function and q_length != kv_length):
        raise ValueError(f"{_ANOTHER_MASK}; {_WAY_OUT}")
    if mask_function is not causal_mask_function:
        _refuse_uncausal(mask_function, batch_size, kv_length, device)
    grows = not isinstance(q_offset, Tensor) and kv_length == q_offset + q_length
    if grows and attention_mask is None:
        return None
    map_BS = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if attention_mask is not None:
        real_BS = pad(attention_mask, (0, max(0, kv_length - attention_mask.shape[1])))[:, :kv_length]
        map_BS = map_BS.masked_fill(~real_BS.bool(), PADDING)
    if grows:
        return mapped_rows(map_BS)
    map_BS = map_BS.masked_fill(torch.arange(kv_length, device=device) >= q_offset + q_length, UNWRITTEN)
    first = attention_mask is not None and attention_mask.shape[1] == q_length  # the cache was empty
    refuse(
        padding_follows(map_BS),
        "with a static cache, padding must be on the left",
        "set the tokenizer's padding_side to 'left', or use a dynamic cache",
        wait=q_length > MAX_QUERIES or first,  # a step waits for nothing
    )
    return map_BS[:, None, None]


def _refuse_uncausal(mask_function: Callable[..., Tensor], batch: int, tokens: int, device: torch.device | str) -> None:
    """Raise ValueError, or assert in a graph, unless the predicate says what a causal one does.

    In graphs transformers makes one of positions, which the hook has seen to go on, for models that have no rotary
    embeddings.
    """
    row_B1 = torch.arange(batch, device=device)[:, None]
    slot_1T = torch.arange(tokens, device=device)[None]
    head = torch.zeros((), dtype=torch.long, device=device)
    before_1T, after_1T = slot_1T[:, :-1], slot_1T[:, 1:]
    sees_next = mask_function(row_B1, head, before_1T, after_1T).any()
    sees_last = mask_function(row_B1, head, after_1T, before_1T).all()
    sees_first = mask_function(row_B1, head, slot_1T, torch.zeros_like(slot_1T)).all()
    refuse(sees_next | ~sees_last | ~sees_first, _ANOTHER_MASK, _WAY_OUT)
