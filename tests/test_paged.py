"""MoBA over a block table, against the same sequences each in a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paging import Server
from torch import Tensor

from openmoba import (
    complete_paged,
    complete_pages,
    moba_attention,
    moba_decode,
    moba_paged,
    new_centroids,
    new_paged_centroids,
)
from openmoba.ops.decode import MAX_QUERIES

SIZES = pytest.mark.parametrize(
    ("page_size", "block_size"), [(4, 4), (2, 4), (1, 5), (12, 4), (8, 8)], ids=lambda n: str(n)
)


class Steps(Server):
    """Steps by torch operations, each sequence beside itself in a cache of its own."""

    def step(self, news: dict[int, int], top_k: int) -> tuple[Tensor, Tensor]:
        """What the paged operation gives, and what each sequence gives by itself."""
        call = self.call(news)
        self.complete(call)
        alone = [
            self.alone(sequence, q_THD, top_k)
            for sequence, q_THD in zip(news, call["q"].split(list(news.values())), strict=True)
        ]
        return moba_paged(**call, top_k=top_k), torch.cat(alone)

    def alone(self, sequence: int, q_THD: Tensor, top_k: int) -> Tensor:
        k_BSHD, v_BSHD = self.keys[sequence][None], self.values[sequence][None]
        blocks = {"block_size": self.block_size, "top_k": top_k}
        if q_THD.shape[0] > MAX_QUERIES:
            return moba_attention(q_THD[None], k_BSHD, v_BSHD, **blocks)[0]
        if not q_THD.shape[0]:
            return q_THD
        tokens = k_BSHD.shape[1]
        lengths, centroids = torch.tensor([tokens], dtype=torch.int32), new_centroids(k_BSHD, tokens, self.block_size)
        complete_pages(centroids, k_BSHD, lengths, None, tokens, self.block_size)
        return moba_decode(q_THD[None], k_BSHD, v_BSHD, centroids, lengths, **blocks)[0]


@SIZES
@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_ragged_batches(top_k: int, page_size: int, block_size: int) -> None:
    """Prompts in chunks, tokens one by one and several at once, idle sequences: all in one call."""
    server = Steps(page_size, block_size)
    a, b, c = server.begin(), server.begin(), server.begin()
    for news in ({a: 21}, {b: 1, a: 1}, {a: 3, c: 38, b: MAX_QUERIES}, {b: 17, a: 0}, {c: 30, a: 2, b: 1}):
        got, expected = server.step(news, top_k)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@SIZES
def test_a_shared_prefix(page_size: int, block_size: int) -> None:
    """Sequences that begin alike read the same pages and centroids; one may begin as soon as these are written."""
    server = Steps(page_size, block_size)
    a = server.begin()
    server.step({a: 40}, 3)
    b = server.begin(a, 24 // page_size)
    got, expected = server.step({a: 1, b: 5}, 3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    c = server.begin(b, 28 // page_size)
    got, expected = server.step({c: 19, b: 2, a: 6}, 3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centroids_are_those_of_a_cache_of_its_own(dtype: torch.dtype, page_size: int, block_size: int) -> None:
    """Bit for bit, whatever the steps in which the tokens came, and nothing else is written."""
    server = Steps(page_size, block_size, dtype)
    server.begin()
    for new in (3, 1, 20, 7, 1, 1, 9):
        server.step({0: new}, 2)
    keys = server.keys[0][None]
    tokens = keys.shape[1]
    expected = new_centroids(keys, tokens, block_size)
    complete_pages(expected, keys, torch.tensor([tokens], dtype=torch.int32), None, tokens, block_size)
    lasts = [(block + 1) * block_size - 1 for block in range(tokens // block_size)]
    places = [(server.tables[0][last // page_size], last % page_size // block_size) for last in lasts]
    pages, within = (torch.tensor(x) for x in zip(*places, strict=True))
    assert server.centroids[pages, within].equal(expected[0, : len(lasts)])
    server.centroids[pages, within] = float("nan")
    assert server.centroids.isnan().all()


def test_pages_that_are_used_again() -> None:
    """Keys, values and centroids that an ended sequence left behind are nobody's."""
    server = Steps(4, 4, pages=13)
    server.step({server.begin(): 40}, 3)
    server.end(0)
    server.begin()
    for new in (23, 1, 18):
        got, expected = server.step({1: new}, 3)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_only_chosen_blocks_are_read() -> None:
    """Of other blocks a few new tokens read the centroids alone."""
    server = Steps(4, 4)
    server.step({server.begin(): 38}, 1)
    call = server.call({0: 1})
    pages = torch.tensor(server.tables[0][:9])
    expected = server.alone(0, call["q"], 1)
    server.k_pages[pages] = server.v_pages[pages] = float("nan")
    torch.testing.assert_close(moba_paged(**call, top_k=1), expected, rtol=1e-12, atol=1e-12)


def wrong(name: str, change: Callable[[Tensor], Tensor], message: str) -> Any:
    return pytest.param(name, change, message, id=f"{name}: {message[:24]}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        wrong(
            "q", lambda x: x[..., :4], r"q must be \[tokens, a multiple of the cache's 3 heads, 8\], got \(6, 6, 4\)"
        ),
        wrong("q", lambda x: x[:, :5], "a multiple of the cache's 3 heads"),
        wrong("q", lambda x: x.float(), "q, k_pages and v_pages must share a dtype"),
        wrong("q", lambda x: x[:5], "cu_seqlens_q must end within q's 5 tokens, got 6"),
        wrong("k_pages", lambda x: x[0], "k_pages must be"),
        wrong("k_pages", lambda x: x[:, :3], "blocks of 4 tokens and pages of 3: one has to divide the other"),
        wrong("v_pages", lambda x: x[:9], "v_pages must have k_pages' shape"),
        wrong("centroids", lambda x: x.half(), r"centroids must be .*new_paged_centroids makes them"),
        wrong("block_table", lambda x: x.long(), "block_table must be int32"),
        wrong("block_table", lambda x: x[:, :4], "sequence 0 has 24 tokens in a cache with room for 16 of it"),
        wrong("block_table", lambda x: x + 200, "block_table names pages .* of sequence 0; there are 200"),
        wrong("block_table", lambda x: x - 1000, "block_table names pages .* of sequence 0; there are 200"),
        wrong("cu_seqlens_q", lambda x: x.new_tensor([0, 4, 3]), "sequence 1 has .*, -1 of them new"),
        wrong("lengths", lambda x: x[:1], r"lengths must be int32 \[2\]"),
        wrong("lengths", lambda x: x * 0, "sequence 0 has 0 tokens .*, 4 of them new"),
        wrong("lengths", lambda x: x.tolist(), "lengths must be a torch.Tensor, got list"),
        wrong("cu_seqlens_q", lambda x: x[1:], r"cu_seqlens_q must be int32 \[3\]"),
        wrong("cu_seqlens_q", lambda x: x.clamp(min=1), "cu_seqlens_q must start at 0, got 1"),
        wrong("centroids", lambda x: x.to("meta"), "centroids must be on k_pages' device cpu, got meta"),
        wrong("v_pages", lambda x: x.to("meta"), "v_pages must be on k_pages' device cpu, got meta"),
        wrong("cu_seqlens_q", lambda x: x.to("meta"), "cu_seqlens_q must be on k_pages' device cpu, got meta"),
        wrong("k_pages", lambda x: x.int(), "k_pages must be a float cache"),
        wrong("k_pages", lambda x: x[..., :7], "head width must be 8 to 256, got 7"),
    ],
)
def test_bad_input(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    server = Steps(4, 4)
    server.step({server.begin(): 20, server.begin(): 9}, 2)
    call = server.call({0: 4, 1: 2})
    with pytest.raises(ValueError, match=message):
        moba_paged(**call | {name: change(call[name])}, top_k=2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (5, "k_pages must be a torch.Tensor, got int"),
        (torch.zeros(4, 2, 8), r"k_pages must be a float cache .*, got torch.float32 \(4, 2, 8\)"),
        (torch.zeros(3, 4, 2, 8).int(), "k_pages must be a float cache .*, got torch.int32"),
        (torch.zeros(3, 0, 2, 8), "with something in a page"),
    ],
)
def test_centroids_of_what_is_no_cache(keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_paged_centroids(keys, 4)


@pytest.mark.parametrize("new", [1, 40], ids=["a step", "a chunk"])
def test_a_block_larger_than_the_sequence_takes_no_more_memory(new: int) -> None:
    pages, q = torch.randn(4, 16, 2, 8), torch.randn(new, 4, 8)
    where = (torch.arange(4).int()[None], torch.tensor([50]).int(), torch.tensor([0, new]).int())

    def out(block_size: int) -> Tensor:
        centroids = new_paged_centroids(pages, block_size)
        complete_paged(centroids, pages, *where, block_size)
        return moba_paged(q, pages, pages, centroids, *where, block_size=block_size, top_k=2)

    assert torch.equal(out(2**30), out(64))


def test_queries_of_no_sequence_are_zero() -> None:
    """What fills up the batch of a CUDA graph: queries behind the last sequence's, and sequences of no token."""
    server = Steps(4, 4)
    server.step({server.begin(): 20, server.begin(): 0}, 2)
    call = server.call({0: 3, 1: 0})
    expected = server.alone(0, call["q"], 2)
    out = moba_paged(**call | {"q": torch.cat([call["q"], server.draw(5, 6, 8)])}, top_k=2)
    torch.testing.assert_close(out[:3], expected, rtol=1e-12, atol=1e-12)
    assert out[3:].eq(0).all()


def test_no_gradient_is_lost_silently() -> None:
    server = Steps(4, 4)
    call = server.call({server.begin(): 4})
    call["q"].requires_grad_()
    with pytest.raises(ValueError, match="has no gradient"):
        moba_paged(**call, top_k=2)
