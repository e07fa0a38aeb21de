"""Choosing and attending as operations: what torch knows of them, whichever backend computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    name: str, q: Tensor, k: Tensor, _v: Tensor, blocks: Tensor | None, cu_q: Tensor | None, _: Any, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    block_size, top_k, _scale = settings
    choice = backend(name).choice_shape(q, k, blocks, cu_q, block_size, top_k)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(choice, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    name, q, k, v, _blocks, cu_q, cu_k, *settings = inputs
    out, lse, choice = output
    ctx.mark_non_differentiable(choice)
    ctx.set_materialize_grads(False)  # else every backward would fill the gradient of lse with zeros
    ctx.save_for_backward(q, k, v, out, lse, choice, cu_q, cu_k)
    ctx.name, ctx.settings = name, settings


def _gradient(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None and d_lse is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    d_out = torch.zeros_like(saved[3]) if d_out is None else d_out
    gradients = attend_backward(ctx.name, d_out, d_lse, *saved, *ctx.settings)
    return None, *gradients, *(None,) * 6


@operation(Backend.forward, fake=_undefined_results, save=_save, gradient=_gradient)
def attend(name: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and choice; the first two differentiable once in q, k and v, backward only."""
    q, k, _, blocks, cu_q, cu_k, block_size, *_ = arguments
    if blocks is not None and blocks.device.type == "cpu":  # on a GPU it is the kernels that look
        check_given_values(blocks, q, k, cu_q, cu_k, block_size)
    return backend(name).forward(*arguments)


def _undefined_blocks(_name: str, q: Tensor, _k: Any, _cu_q: Any, _cu_k: Any, _block_size: int, top_k: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], top_k - 1), dtype=torch.int32)


@operation(Backend.select, fake=_undefined_blocks)
def select(name: str, *arguments: Any) -> Tensor:
    """Return the chosen blocks."""
    return backend(name).select(*arguments)
