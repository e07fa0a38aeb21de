"""The one door between operations and torch.

Compilers, fake tensors, tracers and transforms learn of an operation from what it registers: its schema, what it
returns of tensors without numbers, its gradient, and how it takes batches apart. Plain tensors go around torch's
dispatcher. An attention call whose kernels do nothing takes 51 microseconds of the host through the dispatcher and 33
around it, with its backward 156 and 55 (`results/cpu/host_time.csv`); whole kernels at short lengths take less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function
from torch.library import custom_op, infer_schema
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from openmoba.ops.checks import NO_FORWARD_MODE

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = {Tensor, Parameter, str, int, float, type(None)}


def operation(
    method: Callable[Concatenate[Any, P], R],
    *,
    fake: Callable[..., R],
    save: Callable[..., None] = lambda ctx, inputs, output: None,
    gradient: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., R]], Callable[Concatenate[str, P], R]]:
    """Make an operation of `function(backend, *arguments)`, of tensors that hold numbers on the current device.

    Args:
        method: a backend's, see `openmoba.ops.backends`: where the arguments are written, types and all.
        fake: takes what the function takes, returns undefined tensors like the results.
        save: `save(ctx, inputs, output)` keeps what the gradient needs.
        gradient: `gradient(ctx, *gradients of the results)` returns those of all inputs; None: not differentiable.
        mutates: the arguments that are written to.
    """

    def decorate(function: Callable[..., R]) -> Callable[Concatenate[str, P], R]:
        def launch(name: str, first: Tensor, *arguments: Any) -> R:
            with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
                return function(name, first, *arguments)

        schema = "(str backend, " + infer_schema(MethodType(method, method), mutates_args=mutates)[1:]  # without self
        op = custom_op(f"openmoba::{function.__name__}", launch, mutates_args=mutates, schema=schema)
        op.register_fake(fake)
        written = [i for i, x in enumerate(op._opoverload._schema.arguments) if x.name in mutates]
        op.register_vmap(partial(_one_by_one, op, written))
        registered: Callable[..., R] = op._opoverload
        if gradient is not None:
            op.register_autograd(gradient, setup_context=save)
            traced = _differentiable(registered, save, gradient)
            # Not by way of Python's `apply`, which inspects the signature.
            plain = super(Function, _differentiable(launch, save, gradient)).apply  # type: ignore[misc]

        def call(*arguments: Any) -> Any:
            if gradient is None:
                if is_plain(arguments):
                    return launch(*arguments)
                with torch.no_grad():
                    return registered(*arguments)
            if is_plain(arguments):
                return plain(*unwrap_dead_wrappers(arguments)) if _may_be_differentiated() else launch(*arguments)
            if are_transforms_active():
                # Imports what compiles, which importing openmoba must not.
                from openmoba.ops.transforms import transformed

                return transformed(traced, registered, *arguments)
            return registered(*arguments)

        return cast(Callable[Concatenate[str, P], R], call)

    return decorate


def is_plain(arguments: tuple[Any, ...]) -> bool:
    """Tell whether kernels can be launched on these right away: they hold numbers, and nothing traces what is done."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or are_transforms_active():
        return False
    if not _PLAIN.issuperset(map(type, arguments)):
        return False
    _, first, second, *_ = arguments
    # Batches of gradients (is_grads_batched) are plain by their type; gradients come first.
    return not (
        first.is_meta or is_legacy_batchedtensor(first) or (second is not None and is_legacy_batchedtensor(second))
    )


def refuse_second_derivatives(ctx: Any, *_: Any) -> None:
    """Refuse the gradient of an operation that is a gradient."""
    raise NotImplementedError(
        "openmoba: this implementation is differentiable once; for double backward use impl='reference'"
    )


def _may_be_differentiated() -> bool:
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def _differentiable(run: Callable[..., Any], save: Callable[..., None], rule: Callable[..., Any]) -> type[Function]:
    """Return the autograd function of an operation: backward only, and in batches one by one."""

    class Differentiable(Function):
        forward = staticmethod(run)
        setup_context = staticmethod(save)
        backward = staticmethod(rule)

        @staticmethod
        def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> Any:
            return _one_by_one(Differentiable.apply, [], info, dims, *arguments)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> None:
            raise NotImplementedError(NO_FORWARD_MODE)

    return Differentiable


def _one_by_one(
    function: Callable[..., Any], written: list[int], info: Any, dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """Run `vmap` of a function one by one: its elements have nothing in common that could be computed together."""
    results = []
    for i in range(info.batch_size):
        views = [x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims, strict=True)]
        elements = [x if dim is None else x.contiguous() for x, dim in zip(views, dims, strict=True)]
        results.append(function(*elements))
        for j in written:
            views[j].copy_(elements[j])
    if results[0] is None:
        return None, None
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
