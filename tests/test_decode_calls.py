"""What decoding over a cache refuses, and what completes its pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openmoba import complete_pages, moba_decode, new_centroids

Change = Callable[[Tensor], Any]


def cache() -> dict[str, Tensor]:
    """One row of nine tokens in twelve slots, blocks of four."""
    keys = torch.randn(1, 12, 2, 8)
    return {"keys": keys, "centroids": new_centroids(keys, 12, 4).zero_(), "lengths": torch.tensor([9]).int()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x.tolist(), "q must be a torch.Tensor, got list"),
        ("q", lambda x: x.int(), "q has dtype torch.int32; use float64"),
        ("k_cache", lambda x: x[:, :0], r"k_cache must be \[1, slots >= 1, heads, 8\], got \(1, 0, 2, 8\)"),
        ("k_cache", lambda x: x[:, :, :0], "4 heads must be a multiple of the cache's 0 heads"),
        ("v_cache", lambda x: x.to("meta"), "v_cache must be on q's device cpu, got meta"),
        ("centroids", lambda x: x.sum(), "centroids must be torch.float32"),
        ("lengths", lambda x: None, "lengths must be a torch.Tensor, got NoneType"),
        ("lengths", lambda x: x.long(), r"lengths must be int32 \[1\], got torch.int64 \(1,\)"),
    ],
)
def test_decoding_refuses(name: str, change: Change, message: str) -> None:
    made = cache()
    keys = made["keys"]
    call = {"q": keys[:, -1:].repeat(1, 1, 2, 1), "k_cache": keys, "v_cache": keys} | made
    del call["keys"]
    if message.endswith("0 heads"):
        call["v_cache"] = change(call["v_cache"])
    with pytest.raises(ValueError, match=message):
        moba_decode(**call | {name: change(call[name])}, block_size=4, top_k=2)


@pytest.mark.parametrize(
    ("lengths", "starts", "message"),
    [
        ([5, 13], None, r"row 1 has 13 tokens from slot 0 on in a cache of 12 slots"),
        ([5, 12], [0, 1], r"row 1 has 12 tokens from slot 1 on in a cache of 12 slots"),
        ([-1, 12], None, r"row 0 has -1 tokens"),
        ([5, 5], [-1, 0], r"row 0 has 5 tokens from slot -1 on"),
    ],
)
def test_rows_that_are_not_in_the_cache(lengths: list[int], starts: list[int] | None, message: str) -> None:
    keys, q = torch.randn(2, 12, 2, 8), torch.randn(2, 1, 4, 8)
    centroids = new_centroids(keys, 12, 4).zero_()
    rows = [None if x is None else torch.tensor(x).int() for x in (lengths, starts)]
    with pytest.raises(ValueError, match=message):
        complete_pages(centroids, keys, *rows, 12, 4)
    for impl in ("reference", "triton"):
        with pytest.raises(ValueError, match=message):
            moba_decode(q, keys, keys, centroids, *rows, block_size=4, top_k=2, impl=impl)


def test_blocks_without_a_page() -> None:
    keys, lengths = torch.randn(1, 12, 2, 8), torch.tensor([9]).int()
    for pages in (2, 1):
        centroids = new_centroids(keys, 4 * pages, 4).zero_()
        if pages == 2:
            moba_decode(keys[:, :1], keys, keys, centroids, lengths, block_size=4, top_k=2)
            continue
        with pytest.raises(ValueError, match="2 blocks before its last one, but centroids have 1 pages"):
            moba_decode(keys[:, :1], keys, keys, centroids, lengths, block_size=4, top_k=2)


def test_a_block_larger_than_the_cache_takes_no_more_memory() -> None:
    keys, q, lengths = torch.randn(1, 12, 2, 8), torch.randn(1, 1, 4, 8), torch.tensor([9]).int()

    def out(block_size: int) -> Tensor:
        return moba_decode(q, keys, keys, new_centroids(keys, 12, block_size), lengths, block_size=block_size, top_k=2)

    torch.testing.assert_close(out(2**31 - 1), out(12))


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_slots_of_no_row_are_not_read(impl: str, junk: float) -> None:
    """Memory that nobody wrote lies before a row, behind it, and all along a row that has no token."""
    keys, q = torch.randn(3, 12, 2, 8), torch.randn(3, 2, 4, 8)
    lengths, starts = torch.tensor([7, 0, 1]).int(), torch.tensor([2, 0, 11]).int()

    def out(keys: Tensor) -> Tensor:
        centroids = new_centroids(keys, 12, 4).fill_(junk)
        complete_pages(centroids, keys, lengths, starts, 12, 4)
        return moba_decode(q, keys, keys, centroids, lengths, starts, block_size=4, top_k=2, impl=impl)

    slot_S = torch.arange(12)
    outside = (slot_S < starts[:, None]) | (slot_S >= (starts + lengths)[:, None])
    expected = out(keys)
    assert expected[0].ne(0).all()
    assert torch.equal(out(keys.masked_fill(outside[..., None, None], junk)), expected)


@pytest.mark.parametrize(
    ("keys", "block_size", "message"),
    [
        ([1], 4, "keys must be a torch.Tensor, got list"),
        (torch.zeros(12, 2, 8), 4, r"keys must be a float cache .*, got torch.float32 \(12, 2, 8\)"),
        (torch.zeros(1, 12, 2, 8), 0, "block_size must be >= 1, got 0"),
    ],
)
def test_centroids_of_what_is_no_cache(keys: Any, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_centroids(keys, 12, block_size)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": [1]}, "keys must be a torch.Tensor, got list"),
        ({"keys": torch.zeros(1, 12, 2, 8).long()}, "keys must be a float cache .*, got torch.int64"),
        ({"centroids": torch.zeros(())}, "centroids must be torch.float32"),
        ({"lengths": torch.tensor([9.0])}, r"lengths must be int32 \[1\], got torch.float32"),
        ({"lengths": torch.tensor([9, 9]).int()}, r"lengths must be int32 \[1\], got torch.int32 \(2,\)"),
        ({"starts": torch.tensor(0).int()}, r"starts must be int32 \[1\], got torch.int32 \(\)"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"new": -1}, "new must be >= 0, got -1"),
    ],
)
def test_completing_pages_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete_pages(**cache() | {"starts": None, "new": 9, "block_size": 4} | changed)
