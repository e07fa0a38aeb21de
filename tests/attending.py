"""What the attention tests on CPU and GPU share: an fp64 oracle given the choice, and plain PyTorch beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from openmoba import moba_attention, moba_select
from openmoba.ops.reference import attention_given_selection, attention_mask

NAMES = ("out", "dq", "dk", "dv")
INTERPRETED = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
    pytest.mark.usefixtures("poisoned"),
]
"""Marks of the tests of kernels in Triton's interpreter."""


@dataclass(frozen=True)
class Case:
    """One call: its inputs, the gradient of its output, and its settings."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    block_size: int
    top_k: int
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @property
    def settings(self) -> dict[str, int | Tensor | None]:
        """The keyword arguments of the public functions."""
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "cu_seqlens_q": self.cu_q,
            "cu_seqlens_k": self.cu_k,
        }

    def select(self) -> Tensor:
        """The kernels' own choice."""
        return moba_select(self.q, self.k, **self.settings, impl="triton")


def assert_same_bits(results: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    for x, y in zip(results, others, strict=True):
        assert torch.equal(x, y)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN and the largest integer, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v from the kernels, in poisoned memory."""
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    with poisoned_memory():
        out = moba_attention(*inputs, **case.settings, impl="triton")
        return out.detach(), *torch.autograd.grad(out, inputs, case.d_out)


def batched(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int],
    block_size: int,
    top_k: int,
    device: str = "cpu",
) -> Case:
    """Standard normal inputs of `shape`: sequences, queries, keys, query heads, key/value heads, head width."""
    batch, queries, keys, heads, kv_heads, width = shape
    generator = torch.Generator(device).manual_seed(0)
    q, d_out, k, v = (
        torch.randn(batch, tokens, h, width, generator=generator, device=device).to(dtype)
        for tokens, h in ((queries, heads), (queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    return Case(q, k, v, d_out, block_size, top_k)


def opposed(case: Case, strength: float) -> Case:
    """`case` with queries and keys that point away from each other: all logits are far below 0."""
    width = case.q.shape[-1]
    along = strength / width**0.5
    return replace(case, q=case.q * 0.3 + along, k=case.k * 0.3 - along)


def packed(
    dtype: torch.dtype,
    lengths_q: list[int],
    lengths_k: list[int],
    heads: tuple[int, int, int],
    block_size: int,
    top_k: int,
    device: str = "cpu",
) -> Case:
    """The same for packed sequences; `heads`: query heads, key/value heads, head width."""
    case = batched(dtype, (1, sum(lengths_q), sum(lengths_k), *heads), block_size, top_k, device)
    cu_q, cu_k = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in (lengths_q, lengths_k))
    return Case(case.q[0], case.k[0], case.v[0], case.d_out[0], block_size, top_k, cu_q, cu_k)


def oracle(case: Case, selected: Tensor) -> tuple[Tensor, ...]:
    """The same in fp64, given the choice."""
    return _by_sequence(case, selected, torch.float64, attention_given_selection)


def plain(case: Case, selected: Tensor) -> tuple[Tensor, ...]:
    """The same as plain PyTorch computes it in the inputs' precision, given the choice."""
    return _by_sequence(case, selected, case.q.dtype, _plain_attention)


def assert_as_accurate_as_plain_pytorch(case: Case) -> None:
    """Output and each gradient: root mean square error against fp64 at most twice plain PyTorch's.

    The largest of few errors scatters more than their mean square does, so it may be four times as large.
    """
    selected = case.select()
    results = zip(NAMES, run(case), plain(case, selected), oracle(case, selected), strict=True)
    ratios = {name: _error_ratios(*result) for name, *result in results}
    assert all(mean <= 2 and largest <= 4 for mean, largest in ratios.values()), ratios


def _error_ratios(x: Tensor, plain_x: Tensor, exact: Tensor) -> tuple[float, float]:
    assert x.shape == exact.shape
    assert x.dtype == plain_x.dtype
    error, allowed = ((y.double() - exact).abs() for y in (x, plain_x))
    return float(error.square().sum().sqrt() / allowed.square().sum().sqrt()), float(error.max() / allowed.max())


def _by_sequence(case: Case, selected: Tensor, dtype: torch.dtype, attention) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
    scale = q.shape[-1] ** -0.5
    if case.cu_q is None or case.cu_k is None:
        out = attention(q, k, v, selected, case.block_size, scale)
    else:
        parts = [
            attention(q[None, a:b], k[None, c:d], v[None, c:d], selected[None, a:b], case.block_size, scale)[0]
            for (a, b), (c, d) in zip(pairwise(case.cu_q.tolist()), pairwise(case.cu_k.tolist()), strict=True)
        ]
        out = torch.cat(parts)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), case.d_out.to(dtype))


def _plain_attention(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, selected_BTHK: Tensor, block_size: int, scale: float
) -> Tensor:
    """Masked softmax attention, every intermediate result in the inputs' dtype."""
    group = q_BTHD.shape[2] // k_BSHD.shape[2]
    q_BHTD = q_BTHD.transpose(1, 2)
    k_BHSD, v_BHSD = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k_BSHD, v_BSHD))
    mask_BHTS = attention_mask(selected_BTHK, k_BSHD.shape[1], block_size)
    logit_BHTS = (q_BHTD @ k_BHSD.transpose(-1, -2)) * scale
    weight_BHTS = logit_BHTS.masked_fill(~mask_BHTS, -math.inf).softmax(-1)
    return (weight_BHTS @ v_BHSD).transpose(1, 2)
