"""Key convolution in vLLM on a card, without vLLM: the numbers of whole sequences, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from raw_key_pages import Kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("page_size", [2, 16])
def test_batches(page_size: int, no_waiting: Callable[[], AbstractContextManager[None]]) -> None:
    kept = Kept(page_size, device="cuda")
    a, b = kept.server.begin(), kept.server.begin()
    for news in ({a: 37, b: 5}, {a: 1, b: 13}, {a: 1, b: 1}):
        kept.grow(news)
    c = kept.server.begin(like=a, shared=16 // page_size)
    for news in ({c: 4, a: 1}, {c: 1, a: 1, b: 1}):
        kept.grow(news)
    call = kept.call({a: 1, b: 1, c: 1})
    with no_waiting():
        kept.convolve(**call)
