"""Choosing and attending as operations: what torch knows of them, whichever backend computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.backends import Backend, backend
from openmoba.ops.checks import check_given_values
from openmoba.ops.operation import operation, refuse_second_derivatives


def _undefined_gradients(_name: str, _d_out: Tensor, _d_lse: Any, *qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in qkv[:3])
    return dq, dk, dv


@operation(Backend.backward, fake=_undefined_gradients, gradient=refuse_second_derivatives)
def attend_backward(name: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend`, which differentiate no more."""
    return backend(name).backward(*arguments)


def _undefined_results(
    name: str, q: Tensor, k: Tensor, _v: Tensor, blocks: Tensor | None, blocking: Blocking, _scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    choice = backend(name).choice_shape(q, k, blocks, blocking)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(choice, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    name, q, k, v, _blocks, blocking, scale = inputs
    out, lse, choice = output
    cu_q, cu_k, *sizes = blocking
    ctx.mark_non_differentiable(choice)
    ctx.set_materialize_grads(False)  # else every backward would fill the gradient of lse with zeros
    ctx.save_for_backward(q, k, v, out, lse, choice, cu_q, cu_k)
    ctx.name, ctx.sizes, ctx.scale = name, sizes, scale


def _gradient(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None and d_lse is None:
        return ()
    q, k, v, out, lse, choice, cu_q, cu_k = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    blocking = Blocking(cu_q, cu_k, *ctx.sizes)
    return attend_backward(ctx.name, d_out, d_lse, q, k, v, out, lse, choice, blocking, ctx.scale)


@operation(Backend.forward, fake=_undefined_results, save=_save, gradient=_gradient)
def attend(name: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and choice; the first two differentiable once in q, k and v, backward only."""
    q, k, _, blocks, blocking, _ = arguments
    if blocks is not None and blocks.device.type == "cpu":  # on a GPU it is the kernels that look
        check_given_values(blocks, q, k, blocking)
    return backend(name).forward(*arguments)


def _undefined_blocks(_name: str, q: Tensor, _k: Tensor, blocking: Blocking) -> Tensor:
    return q.new_empty((*q.shape[:-1], blocking.top_k - 1), dtype=torch.int32)


@operation(Backend.select, fake=_undefined_blocks)
def select(name: str, *arguments: Any) -> Tensor:
    """Return the chosen blocks."""
    return backend(name).select(*arguments)
