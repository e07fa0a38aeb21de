"""What the tests of given blocks share: blocks at random, the kernels' results, and an fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from attending import Case, poisoned_memory
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.reference import attention_mask
from openmoba.ops.triton import attention

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Given:
    """A call with blocks of the caller's, and the gradient of its log-sum-exp; the case's `top_k` does not count."""

    case: Case
    blocks: Tensor
    d_lse: Tensor | None = None

    @property
    def scale(self) -> float:
        """The usual factor on logits."""
        return float(self.case.q.shape[-1] ** -0.5)


def at_random(case: Case, most: int, heads: int, with_lse: bool = True) -> Given:
    """Up to `most` past blocks per row: with repeats, in any order, some none; one list for each of `heads`."""
    device = case.q.device
    generator = torch.Generator(device).manual_seed(1)
    own = _own_blocks(case)
    random = torch.rand(*case.q.shape[:-2], heads, most, generator=generator, device=device)
    own = own.int()[:, None, None]
    blocks = torch.minimum((random * (own + 1)).floor().int(), own) - 1  # a product may round up
    d_lse = torch.randn(case.q.shape[:-1], generator=generator, device=device)
    return Given(case, blocks, d_lse if with_lse else None)


def run(given: Given) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and gradients of q, k and v from the kernels, in poisoned memory."""
    case = given.case
    blocking = Blocking(case.cu_q, case.cu_k, case.block_size, given.blocks.shape[-1] + 1)
    with poisoned_memory():
        out, lse, choice = attention.forward(case.q, case.k, case.v, given.blocks, blocking, given.scale)
        expected = attention.choice_shape(case.q, case.k, given.blocks, blocking)
        assert choice.shape == expected
        saved = (case.q, case.k, case.v, out, lse, choice)
        return out, lse, *attention.backward(case.d_out, given.d_lse, *saved, blocking, given.scale)


def assert_as_accurate_as_plain_pytorch(given: Given, results: tuple[Tensor, ...] | None = None) -> None:
    """Each result: root mean square error against fp64 at most twice plain PyTorch's, the largest at most four times.

    Results are the kernels' unless given.
    The log-sum-exp is in fp32, and one rounding of it is free.
    """
    plain = _by_sequence(given, given.case.q.dtype)
    for name, x, rough, right in zip(NAMES, results or run(given), plain, exactly(given), strict=True):
        assert x.shape == right.shape, name
        assert x.dtype == (torch.float32 if name == "lse" else given.case.q.dtype), name
        error, allowed = ((y.double() - right).abs() for y in (x, rough))
        rounding = torch.finfo(torch.float32).eps * right.abs().max() if name == "lse" else 0.0
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + rounding, name
        assert error.max() <= 4 * allowed.max() + rounding, name


def exactly(given: Given) -> tuple[Tensor, ...]:
    """The same results in fp64."""
    return _by_sequence(given, torch.float64)


def _own_blocks(case: Case) -> Tensor:
    """The own block of every query token, `[T]` or packed `[sum T]`."""
    tokens = [torch.arange(b - a - (d - c), b - a) for (a, b), (c, d) in zip(*_borders(case)[::-1], strict=True)]
    return (torch.cat(tokens) // case.block_size).to(case.q.device)


def _borders(case: Case) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where each sequence lies among query tokens and among keys."""
    if case.cu_q is None or case.cu_k is None:
        return [(0, case.q.shape[1])], [(0, case.k.shape[1])]
    return list(pairwise(case.cu_q.tolist())), list(pairwise(case.cu_k.tolist()))


def _by_sequence(given: Given, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """All results, computed plainly in `dtype`."""
    case = given.case
    inputs = [x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    parts = [_attend(*part, case.block_size, given.scale) for part in _sequences(case, inputs, given.blocks)]
    together = 0 if case.cu_q is None else 1
    out, lse = (torch.cat(x, together) for x in zip(*parts, strict=True))
    out, lse = (x if case.cu_q is None else x[0] for x in (out, lse))
    gradients = [case.d_out.to(dtype), torch.zeros_like(lse) if given.d_lse is None else given.d_lse.to(dtype)]
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, gradients)


def _sequences(case: Case, inputs: list[Tensor], blocks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if case.cu_q is None:
        yield *inputs, blocks
        return
    q, k, v = inputs
    for (a, b), (c, d) in zip(*_borders(case), strict=True):
        yield q[None, a:b], k[None, c:d], v[None, c:d], blocks[None, a:b]


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention and its log-sum-exp, every intermediate result in the inputs' dtype."""
    heads = q.shape[2]
    q, k, v = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    mask = attention_mask(blocks.repeat_interleave(heads // blocks.shape[2], 2), k.shape[2], block_size)
    logits = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


def of_moba(case: Case) -> Given:
    """MoBA's own choice, given."""
    return Given(case, case.select())


def on_lists_per_head(given: Given) -> Given:
    """The same with a list for every query head."""
    heads = given.case.q.shape[-2] // given.blocks.shape[-2]
    return replace(given, blocks=given.blocks.repeat_interleave(heads, -2))
