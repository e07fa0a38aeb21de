"""Where the sequences of a batch's rows lie, found once a batch, before the decoder runs.

A row is one sequence, or several packed behind each other, whose `position_ids` restart. transformers looks for
restarts only where there is neither a mask nor a cache, and waits for the device to do so. The hook here looks
wherever they may be, and hands all layers the answer in the place of the attention mask; `openmoba.hf.masks` has its
forms. A batch without a mask and without positions is known to be whole rows, and nothing is looked at.

    mask  positions  cache            what is handed on
    no    no         none             whole rows
    no    yes        none or empty    boundaries of the packed sequences, or whole rows
    yes   yes        none or empty    a segment map, boundaries, or whole rows
    any   any        filled, static   unchanged, once the new positions are seen to go on

A sequence ends where positions do not go on by one, as in transformers; with a mask or a cache, where transformers
takes a jump ahead for part of one sequence, only where they do not rise.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from openmoba.hf.masks import PADDING, boundaries, laid_out, whole_rows
from openmoba.hf.settings import NAME

# B batch, T new tokens of a row

Call = tuple[tuple[Any, ...], dict[str, Any]]


def attach_rows(decoder: nn.Module) -> None:
    """Install the hook on a decoder without its head, once."""
    if not any(isinstance(hook, _LayOutRows) for hook in decoder._forward_pre_hooks.values()):
        names = tuple(signature(decoder.forward).parameters)
        # Models that place tokens in another way read the mask for it, so theirs has to stay as it is.
        rotary = any(name.endswith("rotary_emb") for name, _ in decoder.named_modules())
        decoder.register_forward_pre_hook(_LayOutRows(names, rotary), with_kwargs=True)


class _LayOutRows:
    """The hook. It knows the names of the decoder's arguments, and whether it may replace the mask."""

    def __init__(self, names: tuple[str, ...], rotary: bool) -> None:
        self.names, self.rotary = names, rotary

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if module.config._attn_implementation != NAME:
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        cache = next((x for x in inputs.values() if isinstance(x, Cache)), None)  # releases differ in its name
        # Laid out already, by kind of layer in some models, or refused by the attention function.
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return None
        tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if tokens is None:  # the model says itself what it misses
            return None
        given = inputs.get("cu_seq_lens_q") is not None or inputs.get("cu_seq_lens_k") is not None
        rows: Tensor | None = None
        if positions is None or given:
            rows = whole_rows(tokens) if mask is None and cache is None else None
        else:
            jumps = mask is None and cache is None and not self._caches(module, inputs)
            rows = _rows(positions.expand(tokens.shape[0], -1), mask, cache, jumps, self.rotary)
        return ((), inputs | {"attention_mask": rows}) if self.rotary and rows is not None else None

    @staticmethod
    def _caches(module: Any, inputs: dict[str, Any]) -> bool:
        use_cache = inputs.get("use_cache")
        return bool(module.config.use_cache if use_cache is None else use_cache)


def _rows(positions_BT: Tensor, mask: Tensor | None, cache: Cache | None, jumps: bool, rotary: bool) -> Tensor | None:
    """What takes the mask's place; None to leave it as it is.

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
            _refuse(_breaks(positions_BT, _new_part(mask, before, new), jumps=False).any())
        return None
    real_BT = None if mask is None else mask.bool()
    breaks_BT = _breaks(positions_BT, real_BT, jumps)
    if real_BT is None:
        return boundaries(torch.cat([torch.ones_like(breaks_BT[:, :1]), breaks_BT[:, 1:]], 1))
    return laid_out((1 + breaks_BT.cumsum(-1, dtype=torch.int32)).masked_fill(~real_BT, PADDING))


def _breaks(positions_BT: Tensor, real_BT: Tensor | None, jumps: bool) -> Tensor:
    """Where a token's position does not follow that of the last real token before it, bool `[B, T]`."""
    slot_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    last_BT = slot_T.expand(positions_BT.shape) if real_BT is None else torch.where(real_BT, slot_T, -1).cummax(-1)[0]
    before_BT = torch.nn.functional.pad(last_BT[:, :-1], (1, 0), value=-1)
    step_BT = positions_BT - positions_BT.gather(1, before_BT.clamp(min=0))
    breaks_BT = (step_BT != 1 if jumps else step_BT <= 0) & (before_BT >= 0)
    return breaks_BT if real_BT is None else breaks_BT & real_BT


def _new_part(mask: Tensor | None, before: int | Tensor, new: int) -> Tensor | None:
    """Which of the new tokens are real, bool `[B, T]`; None for all."""
    if mask is None:
        return None
    return mask.bool().index_select(1, before + torch.arange(new, device=mask.device))


def _refuse(packed: Tensor) -> None:
    """Raise ValueError if `packed`, a bool scalar, holds; in a graph or on a GPU, an assertion on the device."""
    if packed.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~packed, "packed sequences in a row that a cache goes on from or a static one takes")
    elif bool(packed):
        raise ValueError(
            "position_ids restart within a row; packed sequences cannot go on from a cache or fill a static one, and "
            "models without rotary embeddings cannot tell them apart: give every sequence a row of its own, or, with "
            "rotary embeddings, run the packed batch with use_cache=False"
        )


def _empty(cache: Cache) -> bool:
    """Whether a cache holds nothing yet and grows; what a static cache holds, the host does not look at."""
    return isinstance(cache, DynamicCache) and cache.get_seq_length() == 0
