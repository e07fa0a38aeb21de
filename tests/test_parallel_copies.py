"""Copies through wide views, and the layouts that attention by heads makes with them, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmoba.parallel import heads
from openmoba.parallel.copies import contiguous, copy_into, wide


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32, torch.int8])
def test_a_wide_view_is_of_the_same_bytes(dtype: torch.dtype) -> None:
    x = numbers(3, 5, 16, dtype=dtype).transpose(0, 1)
    seen = wide(x)
    assert seen.dtype == torch.int64
    assert seen.shape == (5, 3, 16 * x.itemsize // 8)
    assert seen.data_ptr() == x.data_ptr()
    assert torch.equal(seen.view(dtype), x)


BASE = numbers(4, 6, 16)
NARROW = {
    "odd width": BASE[..., :7],
    "strided": BASE[..., ::2],
    "transposed": BASE.transpose(1, 2),
    "begins between": BASE[..., 2:6],
    "rows begin between": numbers(4, 6).as_strided((3, 4), (5, 1)),
    "expanded": numbers(4, 1).expand(4, 8),
    "one number": numbers(1)[0],
    "wide already": numbers(4, 8, dtype=torch.float64),
    "conjugated": numbers(4, 8, dtype=torch.complex64).conj(),
    "negative": numbers(4, 8, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("name", NARROW)
def test_where_no_wide_view_is_copies_are_right(name: str) -> None:
    x = NARROW[name]
    assert wide(x) is x
    out = torch.full_like(x, 7, memory_format=torch.contiguous_format)
    copy_into(out, x)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("width", [16, 7, 4, 0])
def test_copies_change_nothing_else(width: int, dtype: torch.dtype) -> None:
    room = numbers(5, 4, 6, width + 4, dtype=dtype)
    for first in (0, 1, 4):
        x = numbers(4, 5, 3, width, dtype=dtype).transpose(0, 1)
        found, expected = room.clone(), room.clone()
        copy_into(found[:, :, 1:4, first : first + width], x)
        expected[:, :, 1:4, first : first + width] = x
        assert torch.equal(found, expected)
        assert torch.equal(contiguous(x), x)
        assert contiguous(x).is_contiguous()


def test_another_dtype_is_converted() -> None:
    out = torch.empty(3, 8, dtype=torch.bfloat16)
    copy_into(out, numbers(3, 8, dtype=torch.float32))
    assert torch.equal(out, numbers(3, 8))


def plain_parts(x: Tensor, turns: int, ranks: int) -> list[Tensor]:
    x_BSNhD = x.reshape(*x.shape[:2], ranks, -1, x.shape[3])
    return [part.permute(2, 1, 0, 3, 4).contiguous() for part in x_BSNhD.chunk(turns, 3)]


class Still:
    """Stands for an exchange between three ranks; nothing is sent."""

    ranks = 3

    def start(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(contiguous(x) for x in tensors)

    def wait(self) -> tuple[Tensor, ...]:
        return ()


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("width", [4, 3])
def test_heads_leave_and_return(turns: int, width: int) -> None:
    """Both directions and their gradients, one tensor having none, a list of blocks, and a part that is not used."""
    q, k = (numbers(2, 5, n, width, dtype=torch.float64).requires_grad_() for n in (12, 6))
    v, lists = numbers(2, 5, 6, width, dtype=torch.float64), numbers(2, 5, 6, 3, dtype=torch.int32)
    exchanges = [Still() for _ in range(turns)]
    sent = heads._Sent.apply(exchanges, q, k, v, lists)
    assert all(x.is_contiguous() for x in sent)
    for i, x in enumerate((q, k, v, lists)):
        for found, expected in zip(sent[i::4], plain_parts(x, turns, 3), strict=True):
            assert torch.equal(found, expected)
    assert [x.requires_grad for x in sent] == [True, True, False, False] * turns
    assert torch.equal(heads._Placed.apply(exchanges, *sent[::4]), q)
    (unused,) = torch.autograd.grad(sent[0].sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad(plain_parts(q, turns, 3)[0].sum(), q)
    assert torch.equal(unused, expected)
    torch.autograd.gradcheck(lambda q, k: heads._Sent.apply(exchanges, q, k, v), (q, k))
    parts = [x.detach().requires_grad_() for x in sent[::4]]
    torch.autograd.gradcheck(lambda *x: heads._Placed.apply(exchanges, *x), parts)


def test_bf16_gradients_of_any_layout() -> None:
    """Copied wide, from gradients that are not contiguous."""
    q = numbers(2, 5, 12, 8).requires_grad_()
    exchanges = [Still(), Still()]
    out = heads._Placed.apply(exchanges, *heads._Sent.apply(exchanges, q))
    weight = numbers(12, 8, 5, 2).permute(3, 2, 0, 1)
    (gradient,) = torch.autograd.grad(out, q, weight)
    assert torch.equal(out, q)
    assert torch.equal(gradient, weight)
