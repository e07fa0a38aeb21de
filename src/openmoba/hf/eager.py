"""Functions that look at values: kept out of compiled graphs, and asked once per tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

F = TypeVar("F", bound=Callable[..., Any])


def eager(reason: str) -> Callable[[F], F]:
    """Decorator: run the function outside compiled graphs; `reason` is shown where that is not allowed."""

    def mark(function: F) -> F:
        return cast(F, torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]

    return mark


def per_tensor(function: F) -> F:
    """Decorator: remember the answer about the first argument, a tensor, for as long as it lives unchanged.

    The layers of a forward pass share their mask, so what it implies is found out once.
    """
    answers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @wraps(function)
    def ask(tensor: Tensor, *args: Any) -> Any:
        if tensor.is_inference():  # torch does not say when such a tensor changes
            return function(tensor, *args)
        question = (tensor._version, *args)
        if tensor not in answers or answers[tensor][0] != question:
            answers[tensor] = (question, function(tensor, *args))
        return answers[tensor][1]

    return cast(F, ask)
