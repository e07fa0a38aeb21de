"""What each attention layer of a model computes, and the hooks that the attention function relies on.

transformers hands an attention function one layer's queries, keys and values. What lies outside of them reaches it in
three ways, installed here on the modules of a model:

    module.moba             what the layer computes; equal for all layers of a kind, so that they share compiled graphs
    hand_over_cache         before an attention layer: its part of the cache, which holds the centroids
    openmoba.hf.rows        before the decoder: where the sequences of its rows lie
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

from transformers import Cache, PreTrainedModel

from openmoba.config import MobaConfig
from openmoba.hf.cache import paged_layer
from openmoba.hf.key_conv import initialize_as_identity, set_key_conv
from openmoba.hf.raw_keys import raw_keys_layer
from openmoba.hf.rows import attach_rows
from openmoba.hf.settings import NAME
from openmoba.hf.support import check_supported, is_attention


@dataclass(frozen=True)
class LayerSettings:
    """What one layer computes: MoBA with these blocks, or full attention.

    It does not name the layer: compiled graphs are shared by all layers whose settings are equal.
    """

    block_size: int
    top_k: int
    full: bool


FULL = LayerSettings(block_size=1, top_k=1, full=True)


def prepare(model: Any, settings: MobaConfig | None) -> None:
    """Tell every attention layer of `model` what it computes, None for full attention, and install the hooks."""
    layers, sparse = frozenset[int](), FULL
    if settings is not None:
        layers = settings.full_layer_indices(model.config.num_hidden_layers)
        sparse = LayerSettings(settings.block_size, settings.top_k, full=False)
    for module in model.modules():
        if is_attention(module):
            module.moba = FULL if module.layer_idx in layers else sparse
            module.moba_source = model.config.__dict__.get(NAME)
            if hand_over_cache not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(hand_over_cache, with_kwargs=True)
    attach_rows(_decoder(model))


def _decoder(model: Any) -> Any:
    """The innermost model around the attention layers, which every call goes through."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [inner for inner in models if any(is_attention(module) for module in inner.modules())][-1]


def prepare_new_models() -> None:
    """From now on prepare every model whose configuration holds MoBA settings when it is built.

    So models get their layers' settings however they are made: `from_pretrained` of a saved model, or by name with
    `attn_implementation="moba", moba={...}`. transformers calls `post_init` at the end of every model's making. Models
    that MoBA cannot stand in for are refused there, before their weights are read.
    """
    post_init = PreTrainedModel.post_init

    @wraps(post_init)
    def post_init_and_prepare(self: Any) -> None:
        post_init(self)
        if self.config.moba is not None:
            if self.config._attn_implementation == NAME:
                check_supported(self)
            settings = MobaConfig.from_dict(self.config.moba)
            set_key_conv(self, settings.key_conv)
            prepare(self, settings)

    PreTrainedModel.post_init = post_init_and_prepare
    initialize_as_identity()


def settings_of_layer(module: Any) -> LayerSettings:
    """What the attention layer `module` computes.

    Raises:
        ValueError: nobody has said it, or the model's configuration was changed since.
    """
    settings: LayerSettings | None = getattr(module, NAME, None)
    if settings is None or module.moba_source != module.config.__dict__.get(NAME):
        raise ValueError(
            'attn_implementation="moba" needs settings that the layers know: call openmoba.hf.configure(model, '
            "MobaConfig(...)), also after a change of model.config.moba, or load the model with attn_implementation="
            '"moba" and moba={"block_size": ..., "top_k": ...}'
        )
    return settings


def hand_over_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Add `moba_layer` to the arguments of an attention module that runs MoBA with a cache."""
    if module.config._attn_implementation != NAME or module.moba.full:
        return None
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    if cache is None:
        return None
    layer: Any = paged_layer(cache, module.layer_idx, module.moba.block_size)
    if hasattr(module, "key_conv"):
        layer = raw_keys_layer(cache, module.layer_idx)
    return args, {**kwargs, "moba_layer": layer}
