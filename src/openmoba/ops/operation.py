"""The one door between operations and torch.

Compilers, fake tensors, tracers and transforms learn of an operation from what it registers: its schema, what it
returns of tensors without numbers, its gradient, and how it takes batches apart. Plain tensors go around torch's
dispatcher. An attention call whose kernels do nothing takes 51 microseconds of the host through the dispatcher and 33
around it, with its backward 156 and 55 (`results/cpu/host_time.csv`); whole kernels at short lengths take less.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, get_type_hints

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._library.custom_ops import CustomOpDef
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
        method: a backend's, see `openmoba.ops.backends`: where the arguments are written, types and all. One of them
            is a struct (`openmoba.ops.arguments`).
        fake: takes what the function takes, returns undefined tensors like the results.
        save: `save(ctx, inputs, output)` keeps what the gradient needs.
        gradient: `gradient(ctx, *gradients of the results)` returns those of the first tensors, the others having
            none; None: not differentiable.
        mutates: the arguments that are written to.
    """
    struct = _Struct(method)

    def decorate(function: Callable[..., R]) -> Callable[Concatenate[str, P], R]:
        def launch(*arguments: Any) -> R:
            first = arguments[1][0] if struct.begin == 1 else arguments[1]
            with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
                return function(*arguments)

        op = _registered(function.__name__, launch, struct, fake, mutates)
        if gradient is None:
            call = _undifferentiated(op, launch, struct)
        else:
            call = _differentiated(op, launch, struct, save, gradient)
        return cast(Callable[Concatenate[str, P], R], call)

    return decorate


def _registered(
    name: str, launch: Callable[..., Any], struct: _Struct, fake: Callable[..., Any], mutates: tuple[str, ...]
) -> CustomOpDef:
    """Tell torch of an operation: schema, results of tensors without numbers, and how it takes batches apart."""

    def launch_flat(*flat: Any) -> Any:
        return launch(*struct.together(flat))

    op = custom_op(f"openmoba::{name}", launch_flat, mutates_args=mutates, schema=struct.schema(mutates))
    op.register_fake(lambda *flat: fake(*struct.together(flat)))
    written = [i for i, x in enumerate(op._opoverload._schema.arguments) if x.name in mutates]
    op.register_vmap(partial(_one_by_one, op, written))
    return op


def _undifferentiated(op: CustomOpDef, launch: Callable[..., Any], struct: _Struct) -> Callable[..., Any]:
    """Make the call of an operation without a gradient."""
    registered: Callable[..., Any] = op._opoverload

    def call(*arguments: Any) -> Any:
        flat = struct.apart(arguments)
        if is_plain(flat):
            return launch(*arguments)
        with torch.no_grad():
            return registered(*flat)

    return call


def _differentiated(
    op: CustomOpDef,
    launch: Callable[..., Any],
    struct: _Struct,
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[..., Any]:
    """Tell torch of the gradient of an operation; make the call."""

    def save_flat(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, struct.together(inputs), output)

    registered: Callable[..., Any] = op._opoverload
    gradient_flat = _of_all(gradient, len(struct.fields))
    op.register_autograd(gradient_flat, setup_context=save_flat)
    traced = _differentiable(registered, save_flat, gradient_flat)
    # Not by way of Python's `apply`, which inspects the signature.
    plain = super(Function, _differentiable(launch, save, _of_all(gradient, struct.arguments))).apply  # type: ignore[misc]

    def call(*arguments: Any) -> Any:
        flat = struct.apart(arguments)
        if is_plain(flat):
            if not _may_be_differentiated():
                return launch(*arguments)
            return plain(*struct.together(unwrap_dead_wrappers(flat)))
        if are_transforms_active():
            # Imports what compiles, which importing the operation must not.
            from openmoba.ops.transforms import transformed

            return transformed(traced, registered, *flat)
        return registered(*flat)

    return call


class _Struct:
    """The struct among a method's arguments: torch takes its fields one by one, behind the name of a backend."""

    def __init__(self, method: Callable[..., Any]) -> None:
        hints = get_type_hints(method)
        del hints["return"]
        self.begin, self.type = next((i, x) for i, x in enumerate(hints.values(), 1) if hasattr(x, "_fields"))
        self.end = self.begin + len(self.type._fields)
        pairs = [*hints.items()]
        self.arguments = 1 + len(pairs)
        self.fields = {"backend": str, **dict(pairs[: self.begin - 1])}
        self.fields |= {**get_type_hints(self.type), **dict(pairs[self.begin :])}
        self._method = method

    def apart(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put the fields in place of the struct."""
        begin = self.begin
        return (*arguments[:begin], *arguments[begin], *arguments[begin + 1 :])

    def together(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put the struct in place of its fields."""
        begin, end = self.begin, self.end
        return (*flat[:begin], self.type(*flat[begin:end]), *flat[end:])

    def schema(self, mutates: tuple[str, ...]) -> str:
        """Return torch's schema of the arguments, one by one."""

        def prototype() -> None: ...

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=of) for name, of in self.fields.items()]
        prototype.__signature__ = inspect.signature(self._method).replace(parameters=parameters)  # type: ignore[attr-defined]
        return infer_schema(prototype, mutates_args=mutates)


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


def _of_all(gradient: Callable[..., Any], inputs: int) -> Callable[..., tuple[Any, ...]]:
    """Return the gradients of so many inputs, where `gradient` returns those of the first tensors alone."""

    def rule(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        its = gradient(ctx, *gradients)
        return (None, *its, *(None,) * (inputs - 1 - len(its)))

    return rule


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
    if any(dims[j] is None for j in written):
        raise ValueError(
            "openmoba: vmap would write the results of all its elements to the same tensor, which is in no batch; make "
            "it within the function, or map over it too"
        )
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
