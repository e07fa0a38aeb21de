"""Operations under the transforms of `torch.func`, which see forward, backward and batches apart.

`grad`, `vjp`, `jacrev` and `vmap` in any order; forward mode is refused (`openmoba.ops.checks.NO_FORWARD_MODE`).
Registered operations differentiate under no transform, and lose forward-mode derivatives as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import Function

from openmoba.ops.eager import eager


@eager("compilers do not trace transforms of this implementation; use impl='reference' in them")
def transformed(differentiable: type[Function], registered: Callable[..., Any], *arguments: Any) -> Any:
    """Run an operation where transforms are active: its autograd function, which they take apart."""
    interpreter = peek_interpreter_stack()
    assert interpreter is not None
    if interpreter.key() == TransformType.Functionalize:  # which knows registered operations alone
        return registered(*arguments)
    return differentiable.apply(*arguments)  # type: ignore[no-untyped-call]
