"""`moba_decode` and the pages it reads, against the reference on the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openmoba.ops.api import moba_attention
from openmoba.ops.decode import moba_decode
from openmoba.ops.pages import extend_pages, new_pages, refresh_pages

SLOTS, HEADS, KV_HEADS, WIDTH = 53, 6, 3, 8


def random_cache(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, SLOTS, HEADS, WIDTH), (batch, SLOTS, KV_HEADS, WIDTH), (batch, SLOTS, KV_HEADS, WIDTH))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def pages_of(k: Tensor, starts: Tensor, ends: Tensor, block_size: int) -> Tensor:
    """Page sums by definition; incomplete pages hold a large number, which must not matter."""
    sums = torch.full((k.shape[0], -(-SLOTS // block_size), *k.shape[2:]), 1e3, dtype=k.dtype)
    sums = sums if k.dtype == torch.float64 else sums.float()
    for row in range(k.shape[0]):
        tokens = k[row, starts[row] : ends[row]].to(sums.dtype)
        whole = len(tokens) // block_size
        sums[row, :whole] = tokens[: whole * block_size].unflatten(0, (whole, block_size)).sum(1)
    return sums


@pytest.mark.parametrize(("block_size", "top_k"), [(4, 2), (4, 1), (5, 3), (1, 4), (16, 2), (7, 20), (64, 2)])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_against_the_reference(queries: int, block_size: int, top_k: int) -> None:
    """Rows that begin and end anywhere: left padding, free slots behind, a single token."""
    q, k, v = random_cache(5)
    starts = torch.tensor([0, 11, 0, 30, 20], dtype=torch.int32)
    ends = torch.tensor([53, 53, 17, 50, 36], dtype=torch.int32)
    last = torch.stack([q[row, end - queries : end] for row, end in enumerate(ends)])
    sizes: dict[str, Any] = {"block_size": block_size, "top_k": top_k}
    centroids = pages_of(k, starts, ends, block_size)
    out = moba_decode(last, k, v, centroids, ends - starts, starts, **sizes)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        whole = moba_attention(*(x[row : row + 1, start:end] for x in (q, k, v)), **sizes, impl="reference")
        torch.testing.assert_close(out[row], whole[0, -queries:])


def test_queries_before_the_first_token_are_zero() -> None:
    q, k, v = random_cache(2)
    starts = torch.tensor([0, 51], dtype=torch.int32)
    centroids = pages_of(k, starts, torch.tensor([SLOTS, SLOTS]), 4)
    out = moba_decode(q[:, -5:], k, v, centroids, SLOTS - starts, starts, block_size=4, top_k=2)
    assert out[1, :3].eq(0).all()
    assert out.isfinite().all()
    assert out[1, 3:].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """The error against fp64 on the same inputs is that of rounding the output."""
    q, k, v = random_cache(3, dtype)
    zero, end = torch.zeros(3, dtype=torch.int32), torch.full((3,), SLOTS, dtype=torch.int32)
    out = moba_decode(q[:, -4:], k, v, pages_of(k, zero, end, 4), end, block_size=4, top_k=3)
    assert out.dtype == dtype
    whole = moba_attention(q.double(), k.double(), v.double(), block_size=4, top_k=3, impl="reference")
    oracle = whole[:, -4:]
    assert (out.double() - oracle).abs().max() <= 2 * (oracle.to(dtype).double() - oracle).abs().max() + 1e-6


def test_ties_go_to_the_later_page() -> None:
    q, k, v = random_cache(1)
    k[:, 8:12] = k[:, 4:8] = k[:, 0:4]
    end = torch.tensor([14], dtype=torch.int32)
    centroids = pages_of(k, torch.zeros_like(end), end, 4)
    out = moba_decode(q[:, 13:14], k, v, centroids, end, block_size=4, top_k=2)
    later = torch.cat([k[:, 8:14], v[:, 8:14]], -1).repeat_interleave(HEADS // KV_HEADS, 2)
    logits = torch.einsum("bhd,bshd->bhs", q[:, 13], later[..., :WIDTH]) * WIDTH**-0.5
    expected = torch.einsum("bhs,bshd->bhd", logits.softmax(-1), later[..., WIDTH:])
    torch.testing.assert_close(out[:, 0], expected)


@pytest.mark.parametrize("block_size", [1, 4, 7, 64])
def test_pages_by_any_path(block_size: int) -> None:
    """Token by token, in chunks, from scratch, and after keys were taken back: the same complete pages."""
    _, k, _ = random_cache(4, torch.float32)
    starts = torch.tensor([0, 3, 22, 40], dtype=torch.int32)
    sums = new_pages(k, SLOTS, block_size)

    def check(end: int) -> None:
        ends = torch.full_like(starts, end)
        expected = pages_of(k, starts, ends, block_size)
        for row, start in enumerate(starts.tolist()):
            whole = max(0, end - start) // block_size
            torch.testing.assert_close(sums[row, :whole], expected[row, :whole])

    refresh_pages(sums, k, starts, 0, 19, 19, block_size)
    check(19)
    for begin, new in ((19, 1), (20, 5), (25, 1)):
        extend_pages(sums, k[:, begin : begin + new], starts, begin, block_size)
    check(26)
    refresh_pages(sums, k, starts, 26, 49, 23, block_size)
    check(49)
    k[:, 17:] += 1
    refresh_pages(sums, k, starts, 17, 18, 1, block_size)
    check(18)
    for begin in range(18, SLOTS):
        extend_pages(sums, k[:, begin : begin + 1], starts, begin, block_size)
    check(SLOTS)


def test_bad_input() -> None:
    q, k, v = random_cache(2)
    lengths = torch.full((2,), SLOTS, dtype=torch.int32)
    good: dict[str, Any] = {
        "q": q[:, -1:],
        "k_cache": k,
        "v_cache": v,
        "centroids": pages_of(k, torch.zeros_like(lengths), lengths, 4),
        "lengths": lengths,
        "block_size": 4,
        "top_k": 2,
    }
    moba_decode(**good)
    bad = {
        "q": (q[:, :17], "16 tokens"),
        "k_cache": (k[..., :4], "k_cache"),
        "v_cache": (v[:, :9], "v_cache"),
        "centroids": (good["centroids"].float(), "centroids"),
        "lengths": (lengths.long(), "lengths"),
        "starts": (lengths[:1], "starts"),
        "top_k": (0, "top_k=1 attends within the block"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            moba_decode(**(good | {name: value}))
