"""Looking at the values of tensors: outside of graphs only, once per tensor, and with an error where they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

F = TypeVar("F", bound=Callable[..., Any])


def once(method: F) -> F:
    """Decorate a method of a named tuple: remember the answer for as long as the first tensor in it lives unchanged.

    The layers of a forward pass share their mask, so what it implies is found out once. In a graph nothing is
    remembered: its compiler sees itself that layers ask the same. The answer must depend on no other tensor, and not
    be a view of that one, which would then live as long as the answer.
    """

    @wraps(method)
    def ask(self: Any, *args: Any) -> Any:
        return method(self, *args) if torch.compiler.is_compiling() else _remembered(method, self, args)

    return cast(F, ask)


_ANSWERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each tensor its version, and the answers by question."""


def _remembered(method: Callable[..., Any], about: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    tensor = next((x for x in about if isinstance(x, Tensor)), None)
    if tensor is None or tensor.is_inference():  # torch does not say when such a tensor changes
        return method(about, *args)
    if tensor not in _ANSWERS or _ANSWERS[tensor][0] != tensor._version:
        _ANSWERS[tensor] = (tensor._version, {})
    answers = _ANSWERS[tensor][1]
    question = (method, *(x for x in about if not isinstance(x, Tensor)), *args)
    if question not in answers:
        answers[question] = method(about, *args)
    return answers[question]


def refuse(wrong: Tensor, what: str, way_out: str, *, wait: bool = True) -> None:
    """Raise ValueError if `wrong`, a bool scalar, holds; an assertion on the device where the host does not wait."""
    if torch.compiler.is_compiling() or not wait:
        torch._assert_async(~wrong, what)
    elif bool(wrong):
        raise ValueError(f"{what}; {way_out}")
