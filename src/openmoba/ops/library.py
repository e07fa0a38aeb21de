"""torch.library registration: schema, fake, autograd for every implementation that brings its own backward.

An implementation is a module with four functions (shapes as in `openmoba.ops.api`):

    forward(q, k, v, blocks, cu_q, cu_k, block_size, top_k, scale)                           -> out, lse, choice
    backward(d_out, d_lse, q, k, v, out, lse, choice, cu_q, cu_k, block_size, top_k, scale)   -> dq, dk, dv
    select(q, k, cu_q, cu_k, block_size, top_k)                                              -> selected
    choice_shape(q, k, blocks, cu_q, block_size, top_k)                                      -> shape of `choice`

with `lse` fp32 `q.shape[:-1]` (natural logarithm), `selected` int32 `[*q.shape[:-1], top_k - 1]`, and `choice` int32 in
whatever form the implementation's backward reads.
`blocks` and `d_lse` are None.
Modules are imported when an operation first runs, so that importing openmoba needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from openmoba.ops.checks import NO_FORWARD_MODE

_IMPLEMENTATIONS = {"cpu": "openmoba.ops.cpu", "triton": "openmoba.ops.triton.attention"}


def attention(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    """Run the forward of `impl`; differentiable once in q, k and v, backward only.

    The registered operation is there for compilers and other tracers. Its dispatch takes as long as several kernels, so
    plain tensors go around it.
    """
    arguments = (q, k, v, blocks, cu_q, cu_k, block_size, top_k, scale)
    if are_transforms_active():
        from openmoba.ops import transforms  # imports what compiles, which importing openmoba must not

        out: Tensor = transforms.forward(impl, *arguments)[0]
    elif is_plain(q, k, v):
        out = _Attention.apply(impl, *arguments)[0]  # type: ignore[no-untyped-call]
    else:
        out = getattr(torch.ops.openmoba, f"{impl}_forward")(*arguments)[0]
    return out


def select(
    impl: str, q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, block_size: int, top_k: int
) -> Tensor:
    """Run the registered selection operation of `impl`."""
    selected: Tensor = getattr(torch.ops.openmoba, f"{impl}_select")(q, k, cu_q, cu_k, block_size, top_k)
    return selected


def is_plain(*tensors: Tensor) -> bool:
    """Whether kernels can be launched on these right away: they hold numbers, and nothing traces what is done."""
    held = all(type(x) in (Tensor, Parameter) for x in tensors) and not tensors[0].is_meta
    return held and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or are_transforms_active())


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Make x's GPU the current one, on which kernels are launched; nothing for other tensors."""
    context: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return context


class _Attention(torch.autograd.Function):
    """What the registered operation of an implementation does, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, impl: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with device_of(arguments[0]):
            outputs: tuple[Tensor, Tensor, Tensor] = _module(impl).forward(*arguments)
        ctx.impl = impl
        save_for_backward(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 10
        arguments = (d_out, None, *ctx.saved_tensors, *ctx.settings)
        if is_legacy_batchedtensor(d_out):  # of is_grads_batched: the registered operation takes batches apart
            gradients = getattr(torch.ops.openmoba, f"{ctx.impl}_backward")(*arguments)
        elif torch.is_grad_enabled() or are_transforms_active():  # create_graph, and transforms of the gradient
            from openmoba.ops import transforms

            gradients = transforms.backward(ctx.impl, *arguments)
        else:
            gradients = run(ctx.impl, "backward", arguments)
        return None, *gradients, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)


def run(impl: str, name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Run "forward" or "backward" of an implementation, by its registered operation where something traces."""
    q = arguments[0]
    function = getattr(_module(impl), name) if is_plain(q) else getattr(torch.ops.openmoba, f"{impl}_{name}")
    with device_of(q):
        outputs: tuple[Tensor, Tensor, Tensor] = function(*arguments)
    return outputs


def one_by_one(
    function: Callable[..., Any], info: Any, dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """`vmap` of a function: its elements have nothing in common that could be computed together."""

    def element(x: Any, dim: int | None, i: int) -> Any:
        return x if dim is None else x.select(dim, i).contiguous()

    results = [
        function(*[element(x, dim, i) for x, dim in zip(arguments, dims, strict=True)]) for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


@cache
def _module(impl: str) -> ModuleType:
    return import_module(_IMPLEMENTATIONS[impl])


def _register(impl: str) -> None:
    @torch.library.custom_op(f"openmoba::{impl}_forward", mutates_args=())
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        block_size: int,
        top_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with device_of(q):
            outputs: tuple[Tensor, Tensor, Tensor] = _module(impl).forward(
                q, k, v, blocks, cu_q, cu_k, block_size, top_k, scale
            )
        return outputs

    @torch.library.custom_op(f"openmoba::{impl}_backward", mutates_args=())
    def backward(
        d_out: Tensor,
        d_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        choice: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        block_size: int,
        top_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with device_of(q):
            gradients: tuple[Tensor, Tensor, Tensor] = _module(impl).backward(
                d_out, d_lse, q, k, v, out, lse, choice, cu_q, cu_k, block_size, top_k, scale
            )
        return gradients

    @torch.library.custom_op(f"openmoba::{impl}_select", mutates_args=())
    def select(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, block_size: int, top_k: int) -> Tensor:
        with device_of(q):
            selected: Tensor = _module(impl).select(q, k, cu_q, cu_k, block_size, top_k)
        return selected

    @forward.register_fake
    def fake_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        block_size: int,
        top_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        choice = _module(impl).choice_shape(q, k, blocks, cu_q, block_size, top_k)
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        return q.new_empty(q.shape), lse, q.new_empty(choice, dtype=torch.int32)

    backward.register_fake(_fake_backward)
    select.register_fake(_fake_select)
    forward.register_autograd(_Backward(backward), setup_context=save_for_backward)
    backward.register_autograd(refuse_double_backward)
    select.register_vmap(lambda info, dims, *arguments: one_by_one(select, info, dims, arguments))


def _fake_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_select(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, block_size: int, top_k: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], top_k - 1), dtype=torch.int32)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, cu_q, cu_k, *settings = inputs
    out, lse, choice = output
    ctx.mark_non_differentiable(lse, choice)
    ctx.set_materialize_grads(False)  # else every backward would fill gradients of lse and choice with zeros
    ctx.save_for_backward(q, k, v, out, lse, choice, cu_q, cu_k)
    ctx.settings = settings


class _Backward:
    def __init__(self, op: Any) -> None:
        self.op = op

    def __call__(self, ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 9
        dq, dk, dv = self.op(d_out, None, *ctx.saved_tensors, *ctx.settings)
        return dq, dk, dv, None, None, None, None, None, None


def refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "openmoba: this implementation is differentiable once; for double backward use impl='reference'"
    )


for _impl in _IMPLEMENTATIONS:
    _register(_impl)
