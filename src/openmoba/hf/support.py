"""Which models MoBA can stand in for, looked at before anything is changed or written."""

from __future__ import annotations

from typing import Any

from torch import nn

from openmoba.config import MobaConfig
from openmoba.ops.checks import MAX_HEAD_WIDTH, MIN_HEAD_WIDTH

_VARIANTS = {
    "attn_logit_softcapping": "soft-capped logits",
    "sinks": "attention sinks",
    "keep_window_size": "a mask of its own making",
    "indexer": "an indexer that chooses keys",
}

_WAY_OUT = "use a decoder whose layers all read the whole past, such as a Llama, Qwen3 or Mistral"

DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""What families call the share of attention weights that training drops, which MoBA does not compute."""


def check_model(model: Any) -> None:
    """Raise ValueError unless this is a model of transformers, or forwards to one as PEFT's do."""
    if getattr(model, "config", None) is None or not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers; load one with from_pretrained, and give it itself "
            "where it is wrapped, such as in DistributedDataParallel's .module"
        )


def check_settings(settings: Any) -> None:
    """Raise ValueError unless these are settings of MoBA."""
    if not isinstance(settings, MobaConfig):
        raise ValueError(f"settings must be a MobaConfig, got {settings!r}; MobaConfig(block_size=128, top_k=8) is one")


def check_supported(model: Any) -> None:
    """Raise ValueError unless MoBA computes what each attention layer does: causally, over the whole past."""
    config, name = model.config, type(model).__name__
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        raise ValueError(f"MoBA replaces the attention of decoder-only text models; {name} is not one: {_WAY_OUT}")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not take its attention from transformers' AttentionInterface; {_WAY_OUT}")
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention"}:
        raise ValueError(
            f"{name} has layers of types {sorted(kinds)}; MoBA replaces 'full_attention' layers only: {_WAY_OUT}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and not windows_are_idle(config):
        raise ValueError(
            f"{name} attends within a sliding window of {window}; load it with sliding_window=None "
            "to give it MoBA over the whole past"
        )
    layers = [module for module in model.modules() if is_attention(module)]
    if not layers:
        raise ValueError(f"{name} has no attention layers of a kind that MoBA knows; use another model")
    for layer in layers:
        _check_layer(layer, name)
    # By its number a layer finds its setting, and its part of a cache.
    if len({layer.layer_idx for layer in layers}) < len(layers):
        raise ValueError(
            f"{name} has attention layers that share a number (layer_idx), as where layers are run through several "
            f"times; MoBA replaces the attention of plain stacks of layers: {_WAY_OUT}"
        )


def key_value_heads(config: Any) -> int:
    """Return how many heads of keys a decoder has; GPT-NeoX and others, whose heads share no keys, have no entry."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[no-any-return]


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention layer of a decoder."""
    return "Attention" in type(module).__name__ and hasattr(module, "layer_idx")


def windows_are_idle(config: Any) -> bool:
    """Return whether a sliding window, of any size, is that of a kind of layer that the model has not."""
    return set(getattr(config, "layer_types", None) or []) == {"full_attention"}


def _check_layer(module: Any, name: str) -> None:
    layer = f"{name} has a {type(module).__name__}"
    if not hasattr(module, "config"):
        raise ValueError(f"{layer} that does not take its attention from transformers' AttentionInterface; {_WAY_OUT}")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{layer} that is not causal; {_WAY_OUT}")
    for attribute, variant in _VARIANTS.items():
        if getattr(module, attribute, None) is not None:
            raise ValueError(f"{layer} with {variant} ({attribute}), which MoBA does not compute; use another model")
    width = getattr(module, "qk_head_dim", getattr(module, "head_dim", None))
    of_values = getattr(module, "v_head_dim", width)
    if of_values != width:
        raise ValueError(
            f"{layer} with keys of width {width} and values of width {of_values}; MoBA needs heads of one width, "
            f"so models with multi-head latent attention keep theirs: {_WAY_OUT}"
        )
    if width is not None and not MIN_HEAD_WIDTH <= width <= MAX_HEAD_WIDTH:
        raise ValueError(
            f"{layer} with heads of width {width}; MoBA computes widths {MIN_HEAD_WIDTH} to {MAX_HEAD_WIDTH}: "
            "use another model"
        )
