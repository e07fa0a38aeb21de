"""Turning a transformers decoder into MoBA, a layer-wise hybrid, or full attention, and back."""

from __future__ import annotations

from typing import Any

from openmoba.config import MobaConfig
from openmoba.hf.key_conv import set_key_conv
from openmoba.hf.layers import prepare
from openmoba.hf.settings import NAME, put
from openmoba.hf.support import check_model, check_settings, check_supported


def configure(model: Any, settings: MobaConfig | None) -> Any:
    """Give a model MoBA attention as `settings` say, or full attention everywhere for None.

    No parameter is changed, so this may be called at any time, in the middle of training too. Only `key_conv` adds
    parameters, zeros that do nothing until they are trained: ask for it before the optimizer is made, and in every
    later call. The settings become part of `model.config`: `save_pretrained` writes them, and `from_pretrained`
    restores them once `openmoba.hf` is imported.

    Args:
        model: a transformers decoder whose attention goes through `AttentionInterface` (Llama, Qwen3, ...).
        settings: block size, top-k, the layers that keep full attention (through SDPA), and key convolution.

    Returns:
        The same model.

    Raises:
        ValueError: if these are no model and settings; if the model has attention that MoBA does not replace, such as a
            sliding window, values of another width than the keys, or no causal mask; if `settings` name layers that it
            does not have; if its keys have no projection of their own to convolve; or if a trained key convolution
            would be dropped.
    """
    check_model(model)
    if settings is not None:
        check_settings(settings)
        check_supported(model)
        settings.full_layer_indices(model.config.num_hidden_layers)
    set_key_conv(model, None if settings is None else settings.key_conv)
    put(model.config, settings)
    model.set_attn_implementation("sdpa" if settings is None else NAME)
    prepare(model, settings)
    return model


def attend_fully(model: Any) -> Any:
    """Give a model full attention everywhere, as MoBA's full layers compute it; saved, it is a plain model.

    Unlike `configure(model, None)`, which leaves full attention to transformers, it prefers cuDNN's kernels, waits
    for the device only to look at masks and positions that were given, and keeps packed rows apart everywhere.

    Raises:
        ValueError: if the model has attention that MoBA's full layers do not compute, or a trained key convolution.
    """
    check_supported(model)
    set_key_conv(model, None)
    put(model.config, None)
    model.set_attn_implementation(NAME)
    prepare(model, None)
    return model
