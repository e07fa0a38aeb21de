"""Whether a model computes anything: what its configuration asks for may be refused by the forward pass alone."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

_FAKES = logging.getLogger("torch._subclasses.fake_tensor")


def forward(model: Any, weights: dict[str, Tensor] | None = None) -> None:
    """Run two tokens through the model, with other weights by name if they are given."""
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False}
    with torch.no_grad():
        functional_call(model, weights or {}, kwargs=inputs)


def runs_without_data(model: Any) -> bool:
    """Tell whether the forward pass of a model on the meta device fits together, without memory for its weights.

    False says little: routing to experts, for one, reads data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _FAKES.disabled, before = True, _FAKES.disabled  # it reports what is handled here
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            held = [*model.named_parameters(), *model.named_buffers()]
            forward(model, {name: torch.empty(like.shape, dtype=like.dtype) for name, like in held})
    except Exception:  # models compute with values that nobody has checked
        return False
    finally:
        _FAKES.disabled = before
    return True
