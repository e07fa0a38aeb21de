"""Names that releases of transformers differ in, from 5.17 on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_NEW = "activation_checkpointing"
CHECKPOINTING = _NEW if hasattr(PreTrainedModel, f"{_NEW}_enable") else "gradient_checkpointing"
"""The setting of `TrainingArguments` that has activations computed again in the backward pass."""


def recompute_activations(model: Any) -> None:
    """Have a model keep only its layers' inputs, and compute the other activations again in the backward pass."""
    getattr(model, f"{CHECKPOINTING}_enable")()
