"""A layer of the plugin for vLLM on a card, without vLLM: its batches go to the kernels, and wait for nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from paging import Server
from serving_stubs import SCALE, SETTINGS, batch_of, new_layer, place

from openmoba import moba_paged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("page_size", [16, 128])
@torch.inference_mode()  # as vLLM runs models
def test_batches(
    page_size: int, no_waiting: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the operation gives: a whole prompt, chunks, single tokens, a prefix that is shared."""
    monkeypatch.setitem(SETTINGS, "block_size", 128)
    monkeypatch.setitem(SETTINGS, "top_k", 3)
    server = Server(page_size, 128, torch.bfloat16, 2**14 // page_size, 8, 2, 128, "cuda")
    layer, a, b = new_layer(server), server.begin(), server.begin()
    steps = [{a: 900, b: 5}, {a: 1, b: 130}, {a: 1, b: 1}]
    for turn in range(2):
        for news in steps:
            call = server.call(news)
            batch, out = batch_of(call), torch.zeros_like(call["q"])
            if turn:  # by then everything is compiled and made
                with no_waiting():
                    layer.forward(place(2), out, out, out, server.pool, batch, torch.empty_like(out))
            layer.forward(place(2), call["q"], out, out, server.pool, batch, out)
            server.complete(call)
            assert torch.equal(out, moba_paged(**call, top_k=3, scale=SCALE))
        c = server.begin(like=a, shared=768 // page_size)
        steps = [{c: 40, a: 1}, {c: 1, a: 1, b: 1}]
