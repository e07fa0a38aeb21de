"""Key convolution in transformers models: its parameters, where it enters the attention, how it is loaded.

`openmoba.ops.key_conv` defines it. An attention module that has it gets one more child, `key_conv`, whose weight
`[channels, width]` is saved and loaded as `...self_attn.key_conv.weight`, and a class of its own, whose `forward` is
that of its family with the keys that `k_proj` gives convolved. That class holds no state and is the same for all
layers, so that compiled layers share their graph.
"""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, initialization

from openmoba.hf.eager import F, per_tensor
from openmoba.hf.masks import PADDING, UNWRITTEN, runs
from openmoba.hf.raw_keys import raw_keys_layer
from openmoba.hf.settings import NAME
from openmoba.hf.support import is_attention
from openmoba.ops.key_conv import key_convolution

# B batch, T new tokens, S key slots, C channels of all key/value heads


class KeyConvolution(nn.Module):
    """A filter per channel over the last tokens' keys; zero, and so the identity, until it is trained.

    Attributes:
        weight: `[channels, width]`; column d weighs the key d tokens before.
    """

    def __init__(self, channels: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width, dtype=dtype, device=device))

    def forward(self, keys_BTC: Tensor, goes_on_BT: Tensor | None, before_BPC: Tensor | None) -> Tensor:
        """See `openmoba.ops.key_conv.key_convolution`."""
        return key_convolution(keys_BTC, self.weight, goes_on_BT, before_BPC)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return "channels={}, width={}".format(*self.weight.shape)


def set_key_conv(model: Any, width: int | None) -> None:
    """Give every attention layer a key convolution of this width, or none; one of the same width stays as it is.

    Raises:
        ValueError: a family without a `k_proj`, or a trained convolution would be lost.
    """
    layers: list[Any] = [module for module in model.modules() if is_attention(module)]
    for module in layers:
        _check(module, width)
    for module in layers:
        old = getattr(module, "key_conv", None)
        if old is not None and old.weight.shape[1] != width:
            del module.key_conv
            module.__class__ = type(module).__mro__[1]
        if width is not None and not hasattr(module, "key_conv"):
            weight = module.k_proj.weight
            quantized = not weight.is_floating_point() or weight.itemsize == 1
            dtype = model.dtype if quantized else weight.dtype
            module.key_conv = KeyConvolution(module.k_proj.out_features, width, dtype, weight.device)
            kind: Any = type(module)
            module.__class__ = _convolving(kind)


def _check(module: Any, width: int | None) -> None:
    """Raise ValueError unless the layer can have this width and loses nothing."""
    old = getattr(module, "key_conv", None)
    if width is not None and not hasattr(getattr(module, "k_proj", None), "out_features"):
        raise ValueError(
            f"key_conv={width}: {type(module).__name__} has no key projection k_proj of its own; leave key_conv out"
        )
    if old is None or old.weight.shape[1] == width or old.weight.is_meta:
        return
    if bool((old.weight != 0).any()):
        raise ValueError(
            f"this model's key convolution of width {old.weight.shape[1]} is trained, and key_conv={width} would drop "
            f'it; give key_conv={old.weight.shape[1]}, with full_layers="all" for full attention'
        )


@cache
def _convolving(kind: Any) -> Any:
    """The class of an attention module of `kind` with key convolution."""
    names = list(inspect.signature(kind.forward).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.config._attn_implementation != NAME:
            raise ValueError(
                f"this model has a key convolution, which attn_implementation={self.config._attn_implementation!r} "
                f'does not compute; load it with {NAME!r}, and full_layers="all" for full attention'
            )
        return kind.forward(_WithKeys(self, given), *args, **kwargs)

    def reduce(self: Any, _: int) -> Any:
        return _bare, (kind,), self.__dict__

    return type(kind.__name__, (kind,), {"forward": forward, "__reduce_ex__": reduce, "__doc__": kind.__doc__})


def _bare(kind: Any) -> Any:
    """An attention module to unpickle into."""
    convolving = _convolving(kind)
    return convolving.__new__(convolving)


class _WithKeys:
    """Stands for an attention module during one forward pass: the same, but `k_proj` gives convolved keys.

    What the pass is given goes along here and not on the module, since compiled and checkpointed code may not
    write to modules.
    """

    def __init__(self, module: Any, given: dict[str, Any]) -> None:
        self._module, self._given = module, given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def k_proj(self, hidden_states: Tensor) -> Tensor:
        return _convolved(self._module, self._module.k_proj(hidden_states), self._given)


def _convolved(module: Any, keys_BTC: Tensor, given: dict[str, Any]) -> Tensor:
    """The keys of one layer, each with those before it in its sequence, some of them in the cache."""
    past = next((x for x in given.values() if isinstance(x, Cache)), None)
    layer = None if past is None else raw_keys_layer(past, module.layer_idx)
    reach = module.key_conv.weight.shape[1] - 1
    before_BPC = None if layer is None else layer.keys_before(reach)
    segment_map, boundaries = _rows(given)
    out: Tensor
    if boundaries is not None:
        if before_BPC is not None:
            raise ValueError(
                "key convolution takes packed sequences with an empty dynamic cache or none; set use_cache=False"
            )
        flat_1NC = keys_BTC.reshape(1, -1, keys_BTC.shape[2])  # a sequence may go on in the next row
        out = module.key_conv(flat_1NC, _by_boundaries(boundaries, flat_1NC.shape[1]), None).view_as(keys_BTC)
    else:
        goes_on_BT = None
        if segment_map is not None:
            if layer is None or not layer.takes_left_padding_only:
                _refuse_holes(segment_map)
            if segment_map.shape[3] == keys_BTC.shape[1]:
                goes_on_BT = _by_map(segment_map)
            if layer is not None:
                keys_BTC = keys_BTC.masked_fill(_padding(segment_map, keys_BTC.shape[1]), 0)
        out = module.key_conv(keys_BTC, goes_on_BT, before_BPC)
    if layer is not None:
        layer.append_raw_keys(keys_BTC, reach)
    return out


def _rows(given: dict[str, Any]) -> tuple[Any, Any]:
    """A segment map, or boundaries of packed sequences, or neither for whole rows, see `openmoba.hf.masks`."""
    mask, boundaries = given.get("attention_mask"), given.get("cu_seq_lens_q")
    if mask is None or mask.dtype != torch.int32 or mask.shape[3] == 0:  # the attention refuses other masks
        return None, boundaries
    return (None, mask) if mask.shape[2] > 1 else (mask, boundaries)


def _shared(function: F) -> F:
    """Decorator: asked once per tensor, since layers share it; inside a graph the compiler sees to that."""
    once = per_tensor(function)

    @wraps(function)
    def ask(tensor: Tensor, *args: Any) -> Any:
        return function(tensor, *args) if torch.compiler.is_compiling() else once(tensor, *args)

    return cast(F, ask)


@_shared
def _by_boundaries(boundaries: Tensor, tokens: int) -> Tensor:
    """Which tokens of the flattened batch go on with a sequence, bool `[1, B T]`."""
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=boundaries.device)
    return ~starts.index_fill(0, boundaries.flatten().long(), True)[None, :tokens]


@_shared
def _by_map(segment_map: Tensor) -> Tensor:
    """Which tokens go on with the sequence of the slot before, bool `[B, T]`."""
    return ~runs(segment_map[:, 0, 0])


@_shared
def _padding(segment_map: Tensor, tokens: int) -> Tensor:
    """Which of the last written slots are padding, bool `[B, T, 1]`."""
    map_BS = segment_map[:, 0, 0]
    if map_BS.shape[1] > tokens:
        written = (map_BS[0] != UNWRITTEN).sum()
        map_BS = map_BS.index_select(1, written - tokens + torch.arange(tokens, device=map_BS.device))
    return (map_BS == PADDING)[..., None]


@_shared
def _refuse_holes(segment_map: Tensor) -> None:
    """Error if padding lies between the tokens of a sequence: the keys before it would be missed."""
    map_BS = segment_map[:, 0, 0]
    earlier_BS = map_BS.cummax(1).values[:, :-1]
    resumes = ((map_BS[:, :-1] == PADDING) & (map_BS[:, 1:] > PADDING) & (map_BS[:, 1:] == earlier_BS)).any()
    message = "key convolution takes no padding between the tokens of a sequence"
    if torch.compiler.is_compiling():
        torch._assert_async(~resumes, message)
    elif bool(resumes):
        raise ValueError(f"{message}: set the tokenizer's padding_side to 'left', or use one row at a time")


def initialize_as_identity() -> None:
    """Make transformers start a convolution at zero that a checkpoint lacks.

    It leaves the weights of such modules to a model's class, which knows nothing of this one.
    """
    initialize = PreTrainedModel._initialize_weights

    @wraps(initialize)
    def initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialize(self, module, *args, **kwargs)
        if isinstance(module, KeyConvolution):
            initialization.zeros_(module.weight)  # leaves loaded weights alone

    PreTrainedModel._initialize_weights = initialize_weights
