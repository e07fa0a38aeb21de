"""The operation under the transforms of `torch.func`, which see forward, backward and batches apart.

`grad`, `vjp`, `jacrev` and `vmap` in any order; forward mode is refused (`openmoba.ops.checks.NO_FORWARD_MODE`).
Registered operations differentiate under no transform, and lose forward-mode derivatives as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack

from openmoba.ops.checks import NO_FORWARD_MODE
from openmoba.ops.library import one_by_one, refuse_double_backward, run, save_for_backward


@torch.compiler.disable(reason="compilers do not trace transforms of this implementation; use impl='reference' in them")  # type: ignore[no-untyped-call,untyped-decorator]
def forward(impl: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and choice of an implementation, see `openmoba.ops.library`."""
    interpreter = peek_interpreter_stack()
    assert interpreter is not None
    if interpreter.key() == TransformType.Functionalize:  # which knows registered operations alone
        outputs: tuple[Tensor, ...] = getattr(torch.ops.openmoba, f"{impl}_forward")(*arguments)
    else:
        outputs = _Forward.apply(impl, *arguments)  # type: ignore[no-untyped-call]
    return outputs


def backward(impl: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v that transforms see, and that refuse to be differentiated again."""
    gradients: tuple[Tensor, Tensor, Tensor] = _Backward.apply(impl, *arguments)  # type: ignore[no-untyped-call]
    return gradients


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(impl: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run(impl, "forward", arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.impl = inputs[0]
        save_for_backward(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 10
        gradients = backward(ctx.impl, d_out, None, *ctx.saved_tensors, *ctx.settings)
        return None, *gradients, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return one_by_one(_Forward.apply, info, dims, arguments)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(impl: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run(impl, "backward", arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        refuse_double_backward(ctx)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return one_by_one(_Backward.apply, info, dims, arguments)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)
