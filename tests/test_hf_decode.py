"""`moba_decode` and the pages it reads, against the reference on the whole sequence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openmoba import complete_pages, moba_attention, moba_decode, new_centroids
from openmoba.ops.centroids import ANCHOR_KEYS

SLOTS, HEADS, KV_HEADS, WIDTH = 53, 6, 3, 8


def random_cache(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, SLOTS, HEADS, WIDTH), (batch, SLOTS, KV_HEADS, WIDTH), (batch, SLOTS, KV_HEADS, WIDTH))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def pages_of(k: Tensor, starts: Tensor, ends: Tensor, block_size: int) -> Tensor:
    """Centroids by definition, head by head; incomplete pages hold a large number, which must not matter."""
    dtype = torch.float16 if k.dtype in (torch.float16, torch.bfloat16) else k.dtype
    centroids = torch.full((k.shape[0], -(-SLOTS // block_size), *k.shape[2:]), 1e3, dtype=dtype)
    for row, head in itertools.product(range(k.shape[0]), range(k.shape[2])):
        keys = k[row, starts[row] : max(starts[row], ends[row]), head].double()
        if len(keys) < block_size:
            continue
        first = keys[: min(block_size, ANCHOR_KEYS)]
        anchor = first.mean(0)
        spread = max((first - anchor).abs().max(), anchor.abs().max() / 64)
        for page in range(len(keys) // block_size):
            mean = keys[page * block_size : (page + 1) * block_size].mean(0)
            centroids[row, page, head] = (mean - anchor) * 2.0 ** -math.floor(math.log2(spread))
    return centroids


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 4, 7, 20, 64])
def test_pages_by_any_path(block_size: int, dtype: torch.dtype) -> None:
    """Token by token, in chunks, from scratch, and after keys were taken back: the same bits, as they are defined."""
    _, k, _ = random_cache(4, dtype)
    starts = torch.tensor([0, 3, 22, 40], dtype=torch.int32)
    centroids = new_centroids(k, SLOTS, block_size).fill_(torch.nan)

    def fill(begin: int, *ends: int) -> None:
        for end in ends:
            complete_pages(centroids, k, (end - starts).clamp(min=0), starts, end - begin, block_size)
            begin = end
            once = new_centroids(k, SLOTS, block_size).fill_(torch.nan)
            complete_pages(once, k, (end - starts).clamp(min=0), starts, SLOTS, block_size)
            expected = pages_of(k, starts, torch.full_like(starts, end), block_size)
            for row, start in enumerate(starts.tolist()):
                whole = max(0, end - start) // block_size
                assert torch.equal(centroids[row, :whole], once[row, :whole])
                assert once[row, whole:].isnan().all()
                torch.testing.assert_close(centroids[row, :whole], expected[row, :whole])

    fill(0, 19, 20, 25, 26, 49)
    k[:, 17:] += 1
    fill(17, 18)
    fill(18, *range(19, SLOTS + 1))


def test_pages_far_from_the_first_do_not_overflow() -> None:
    k = torch.ones(1, 8, 1, 8, dtype=torch.float16)
    k[:, 4:] = -6e4
    centroids, end = new_centroids(k, 8, 4), torch.tensor([8], dtype=torch.int32)
    complete_pages(centroids, k, end, None, 8, 4)
    assert centroids[0, 0].eq(0).all()
    assert centroids[0, 1].eq(-65504).all()


def test_pages_are_relative_to_the_first_of_many_keys() -> None:
    k, end = torch.zeros(1, 256, 1, 8), torch.tensor([256], dtype=torch.int32)
    k[:, ANCHOR_KEYS:] = 1
    centroids = new_centroids(k, 256, 128)
    complete_pages(centroids, k, end, None, 256, 128)
    assert centroids[0, :, 0, 0].tolist() == [0.5, 1.0]


def test_centroids_of_other_keys() -> None:
    _, k, _ = random_cache(1, torch.bfloat16)
    end = torch.tensor([SLOTS], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"float16 \[1, pages, 3, 8\].*new_centroids"):
        complete_pages(new_centroids(k.float(), SLOTS, 4), k, end, None, 1, 4)


def test_no_gradient_is_lost_silently() -> None:
    q, k, v = random_cache(1)
    end = torch.full((1,), SLOTS, dtype=torch.int32)
    arguments = (q[:, -1:].requires_grad_(), k, v, pages_of(k, torch.zeros(1, dtype=torch.int32), end, 4), end)
    with pytest.raises(ValueError, match="has no gradient"):
        moba_decode(*arguments, block_size=4, top_k=2)
    with torch.no_grad():
        assert moba_decode(*arguments, block_size=4, top_k=2).isfinite().all()


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
