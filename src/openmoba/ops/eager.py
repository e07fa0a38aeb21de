"""Functions that compilers do not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eager(reason: str) -> Callable[[F], F]:
    """Decorate a function to run it outside compiled graphs; `reason` is shown where that is not allowed."""

    def mark(function: F) -> F:
        return cast(F, torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]

    return mark
