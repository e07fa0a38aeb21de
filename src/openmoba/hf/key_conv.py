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

from openmoba.hf.cache import KeptLayer, kept_layer
from openmoba.hf.layout import Layout
from openmoba.hf.settings import NAME
from openmoba.hf.shards import convolve_sharded
from openmoba.hf.support import is_attention
from openmoba.ops.key_conv import key_convolution
from openmoba.parallel.current import current_sharding

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
        """See `openmoba.ops.key_conv.key_convolution`; under a sharding the keys are this process's part."""
        sharding = current_sharding()
        if sharding is not None:
            return convolve_sharded(keys_BTC, self.weight, sharding)
        return key_convolution(keys_BTC, self.weight, goes_on_BT, before_BPC)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
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
    """Return the class of an attention module of `kind` with key convolution."""
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
    """Return an attention module to unpickle into."""
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
    """Convolve the keys of one layer, each with those before it in its sequence, some of them in the cache."""
    if current_sharding() is not None:  # which says where sequences begin; what else would, attention refuses
        return cast(Tensor, module.key_conv(keys_BTC, None, None))
    past = next((x for x in given.values() if isinstance(x, Cache)), None)
    layer = None if past is None else _cached(past, module.layer_idx)
    reach = module.key_conv.weight.shape[1] - 1
    before_BPC = None if layer is None else layer.keys_before(reach)
    mask, cu_q, cu_k = (given.get(name) for name in ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k"))
    layout = Layout.read(mask, cu_q, cu_k, (keys_BTC.shape[0], keys_BTC.shape[1]))
    if layout.cu_q is not None and before_BPC is not None:
        raise ValueError(
            "key convolution takes packed sequences with an empty dynamic cache or none; set use_cache=False"
        )
    if layer is None or not layer.takes_left_padding_only:
        layout.refuse_holes(
            "key convolution takes no padding between the tokens of a sequence",
            "set the tokenizer's padding_side to 'left', or use one row at a time",
        )
    if layer is not None:
        keys_BTC = layout.without_padding(keys_BTC)
    goes_on_1N = layout.goes_on()
    if goes_on_1N is None:
        out_BTC = module.key_conv(keys_BTC, None, before_BPC)
    else:  # flattened, as a packed sequence may go on in the next row
        out_BTC = module.key_conv(keys_BTC.flatten(0, 1)[None], goes_on_1N, None).view_as(keys_BTC)
    if layer is not None:
        layer.append_raw_keys(keys_BTC, reach)
    return cast(Tensor, out_BTC)


def _cached(cache: Cache, layer_idx: int) -> KeptLayer:
    layer = kept_layer(cache, layer_idx)
    if layer is None:
        raise ValueError(
            f"key convolution needs a dynamic or static cache, got a {type(cache.layers[layer_idx]).__name__}; "
            "leave cache_implementation out, or set it to 'static'"
        )
    return layer


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
