"""Key convolution over a block table on a card: as in whole sequences, in CUDA graphs too, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from raw_key_pages import Kept

from openmoba.bench.timing import replayed

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


def test_a_graph_of_a_step_is_good_for_the_next_ones() -> None:
    """What lies in a batch's tensors is read when the graph is launched."""
    kept = Kept(16, device="cuda")
    a, b = kept.server.begin(), kept.server.begin()
    kept.grow({a: 37, b: 5})
    news = {a: 1, b: 1}
    for request in news:
        kept.server.write(request, 1)
    batch, before = kept.call(news), kept.raw_keys.clone()
    step = replayed(lambda: kept.convolve(**batch))
    kept.raw_keys.copy_(before)  # as it was before the step was run to compile it
    for _ in range(4):
        expected = torch.cat([kept.whole(request, 1) for request in news])
        torch.testing.assert_close(step(), expected, rtol=1e-14, atol=1e-14)
        for request in news:
            kept.server.write(request, 1)
        for name, x in kept.call(news).items():
            batch[name].copy_(x)
