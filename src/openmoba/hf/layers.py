"""What each attention layer of a model computes, and the hooks that the attention function relies on.

transformers hands an attention function one layer's queries, keys and values. What lies outside of them reaches it in
three ways, installed here on the modules of a model:

    module.moba             its kind of attention, see `openmoba.hf.kinds`
    hand_over_cache         before an attention layer: its part of the cache, which holds the centroids
    find_layout             before the decoder: where the tokens of its rows lie, in the place of the mask
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import Cache, PreTrainedModel

from openmoba.config import MobaConfig
from openmoba.hf.cache import kept_layer
from openmoba.hf.find_layout import attach_finder
from openmoba.hf.key_conv import initialize_as_identity, set_key_conv
from openmoba.hf.kinds import Full, Kind, Moba
from openmoba.hf.settings import NAME
from openmoba.hf.support import check_supported, is_attention


def prepare(model: Any, settings: MobaConfig | None) -> None:
    """Tell every attention layer of `model` what it computes, None for full attention, and install the hooks."""
    full_layers, sparse = frozenset[int](), None
    if settings is not None:
        full_layers = settings.full_layer_indices(model.config.num_hidden_layers)
        sparse = Moba(settings.block_size, settings.top_k)
    for module in model.modules():
        if is_attention(module):
            module.moba = Full() if sparse is None or module.layer_idx in full_layers else sparse
            module.moba_source = model.config.__dict__.get(NAME)
            if hand_over_cache not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(hand_over_cache, with_kwargs=True)
    attach_finder(_decoder(model))


def _decoder(model: Any) -> Any:
    """Return the innermost model around the attention layers, which every call goes through."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [inner for inner in models if any(is_attention(module) for module in inner.modules())][-1]


def prepare_new_models() -> None:
    """Prepare, from now on, every model whose configuration holds MoBA settings when it is built.

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


def kind_of_layer(module: Any) -> Kind:
    """Return the kind of attention that `module` is of.

    Raises:
        ValueError: nobody has said it, or the model's configuration was changed since.
    """
    kind: Kind | None = getattr(module, NAME, None)
    if kind is None or module.moba_source != module.config.__dict__.get(NAME):
        raise ValueError(
            'attn_implementation="moba" needs settings that the layers know: call openmoba.hf.configure(model, '
            "MobaConfig(...)), also after a change of model.config.moba, or load the model with attn_implementation="
            '"moba" and moba={"block_size": ..., "top_k": ...}'
        )
    return kind


def hand_over_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Add `moba_layer` to the arguments of an attention module that runs MoBA with a cache."""
    if module.config._attn_implementation != NAME or not isinstance(module.moba, Moba):
        return None
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    if cache is None:
        return None
    return args, {**kwargs, "moba_layer": kept_layer(cache, module.layer_idx, module.moba.block_size)}
