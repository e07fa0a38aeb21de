"""Handing a layer's cache to its attention function.

transformers gives an attention function the cached keys and values, not the cache that holds them, and with it not
the centroids. A forward pre-hook on the attention module sees the cache and passes the layer on as `moba_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache

from openmoba.hf.cache import paged_layer
from openmoba.hf.settings import NAME, settings_of


def attach(module: nn.Module) -> None:
    """Install the hook on an attention module, once; not while its graph is being captured."""
    if not torch.compiler.is_compiling() and hand_over_cache not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hand_over_cache, with_kwargs=True)


def hand_over_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Add `moba_layer` to the arguments of an attention module that runs MoBA with a cache."""
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    config = module.config
    if cache is None or config._attn_implementation != NAME:
        return None
    settings = settings_of(config)
    if module.layer_idx in settings.full_layer_indices(config.num_hidden_layers):
        return None
    layer = paged_layer(cache, module.layer_idx, settings.block_size)
    return args, {**kwargs, "moba_layer": layer}
