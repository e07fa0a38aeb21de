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
