"""Marking functions that `torch.compile` must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., object])


def eager(reason: str) -> Callable[[F], F]:
    """Decorator: run the function outside compiled graphs; `reason` is shown where that is not allowed."""

    def mark(function: F) -> F:
        return cast(F, torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]

    return mark
