"""The kernels over a block table on a card: 16 bits, pages of any size, CUDA graphs whose lengths and tables change.

The kernels run in poisoned memory: `torch.empty` returns NaN and the largest integer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from attending import poisoned_memory
from paging import NOWHERE, Server, expected
from torch import Tensor

from openmoba import complete_paged, complete_pages, moba_attention, moba_decode, moba_paged, new_centroids
from openmoba.bench.timing import replayed
from openmoba.ops.triton import paged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def new_server(
    page_size: int, block_size: int, dtype: torch.dtype = BF16, room: int = 2**15, heads: int = 8, width: int = 128
) -> Server:
    return Server(page_size, block_size, dtype, room // page_size, heads, heads // 4, width, "cuda")


def attend(server: Server, call: dict[str, Any], top_k: int) -> Tensor:
    """Upkeep and attention by the kernels."""
    with poisoned_memory():
        server.complete(call)
        return moba_paged(**call, top_k=top_k)


def far_off(out: Tensor, wanted: Tensor) -> float:
    """Share of the queries that are further from fp64 than rounding, as those are that read another block."""
    error = (out.double() - wanted).norm(dim=-1)
    return float((error > (2 * torch.finfo(out.dtype).eps + 1e-5) * wanted.norm(dim=-1)).double().mean())


@pytest.fixture(params=["decoding", "prefill"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernels run: those for a few queries, or those for many."""
    monkeypatch.setattr(paged, "are_few", lambda *_: request.param == "decoding")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("page_size", [16, 64, 128, 256, 512])
@pytest.mark.parametrize(("block_size", "top_k"), [(128, 8), (512, 3)])
def test_ragged_batches(block_size: int, top_k: int, page_size: int) -> None:
    """A chunk of a prompt, single tokens, several, none, and a whole prompt, against fp64 given the centroids."""
    server = new_server(page_size, block_size)
    a, b, c, d = (server.begin() for _ in range(4))
    server.complete(server.call({a: 4300, b: 2047, c: 130}))
    for news in ({a: 1, b: 1, c: 1}, {a: 67, b: 1, c: 0, d: 90}, {b: 3, d: 16}):
        call = server.call(news)
        assert far_off(attend(server, call, top_k), expected(call, top_k)) <= 2e-3


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("dtype", "page_size", "block_size", "width", "top_k"),
    [(FP16, 32, 64, 64, 4), (FP32, 16, 32, 80, 5), (BF16, 40, 20, 40, 6), (FP16, 64, 64, 256, 3), (BF16, 1, 5, 16, 40)],
)
def test_other_sizes(dtype: torch.dtype, page_size: int, block_size: int, width: int, top_k: int) -> None:
    server = new_server(page_size, block_size, dtype, 2**13, 12, width)
    server.complete(server.call({server.begin(): 900, server.begin(): block_size - 1}))
    call = server.call({0: 5, 1: 2})
    assert far_off(attend(server, call, top_k), expected(call, top_k)) <= 2e-3


@pytest.mark.parametrize(
    ("page_size", "block_size", "top_k"), [(128, 128, 8), (512, 128, 8), (16, 128, 8), (512, 512, 3)]
)
def test_against_contiguous_calls(page_size: int, block_size: int, top_k: int) -> None:
    """Up to rounding; almost everywhere bit for bit in a prefill by the same kernels: blocks that lie in one page."""
    server = new_server(page_size, block_size)
    server.complete(server.call({server.begin(): 6000}))
    step = server.call({0: 1})
    keys, values = (x[0][None] for x in (server.keys, server.values))
    lengths, centroids = step["lengths"], new_centroids(keys, 6001, block_size)
    complete_pages(centroids, keys, lengths, None, 6001, block_size)
    settings: dict[str, Any] = {"block_size": block_size, "top_k": top_k}
    contiguous = moba_decode(step["q"][None], keys, values, centroids, lengths, **settings)[0]
    assert far_off(attend(server, step, top_k), contiguous.double()) == 0
    chunk = server.call({0: 1500})
    keys, values = (x[0][None] for x in (server.keys, server.values))
    contiguous = moba_attention(chunk["q"][None], keys, values, **settings)[0]
    out = attend(server, chunk, top_k)
    assert far_off(out, contiguous.double()) <= 2e-3
    if page_size >= block_size:
        assert (out == contiguous).double().mean() > 0.998


@pytest.mark.parametrize("page_size", [16, 128])
def test_a_shared_prefix(page_size: int) -> None:
    server = new_server(page_size, 64)
    server.complete(server.call({server.begin(): 2000}))
    b = server.begin(0, 1024 // page_size)
    for news in ({0: 1, b: 300}, {0: 1, b: 1}):
        call = server.call(news)
        assert far_off(attend(server, call, 4), expected(call, 4)) <= 2e-3


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("kernels_for", ["decoding", "prefill"])
def test_cuda_graph_whose_lengths_and_tables_change(
    page_size: int, kernels_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One capture of upkeep and attention; other sequences, lengths and numbers of new tokens in each replay."""
    monkeypatch.setattr(paged, "are_few", lambda *_: kernels_for == "decoding")
    server = new_server(page_size, 128)
    for tokens in (3000, 255, 128, 1, 700):
        server.complete(server.call({server.begin(): tokens}))
    room, queries = 4096 // page_size, 40
    q = torch.zeros(queries, 8, 128, dtype=BF16, device="cuda")
    static = {
        "block_table": torch.zeros(3, room, dtype=torch.int32, device="cuda"),
        "lengths": torch.zeros(3, dtype=torch.int32, device="cuda"),
        "cu_seqlens_q": torch.zeros(4, dtype=torch.int32, device="cuda"),
    }
    settings: dict[str, Any] = {"block_size": 128}

    def step() -> Tensor:
        complete_paged(server.centroids, server.k_pages, **static, **settings)
        return moba_paged(q, server.k_pages, server.v_pages, server.centroids, **static, **settings, top_k=4)

    replay = replayed(step)
    for news in ({0: 1, 1: 1, 2: 1}, {4: 17, 3: 1, 0: 20}, {1: 40}, {2: 0, 4: 3, 1: 2}, {0: 1, 1: 1, 2: 1}):
        call = server.call(news)
        sequences, tokens = len(news), call["q"].shape[0]
        q.zero_()[:tokens] = call["q"]
        static["block_table"].fill_(NOWHERE)[:sequences, : call["block_table"].shape[1]] = call["block_table"]
        static["lengths"].zero_()[:sequences] = call["lengths"]
        static["cu_seqlens_q"].fill_(tokens)[: sequences + 1] = call["cu_seqlens_q"]
        out = replay()
        assert far_off(out[:tokens], expected(call, 4)) <= 2 / (8 * tokens)
        assert out[tokens:].eq(0).all()


def test_compiled_step() -> None:
    server = new_server(16, 64)
    server.complete(server.call({server.begin(): 700, server.begin(): 90}))
    call = server.call({0: 1, 1: 2})
    server.complete(call)
    others = {name: x for name, x in call.items() if name != "q"}

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def step(q: Tensor) -> Tensor:
        return 2 * moba_paged(q + 1, **others, top_k=4)

    for _ in range(3):
        assert torch.equal(step(call["q"]), 2 * moba_paged(call["q"] + 1, **others, top_k=4))


@pytest.mark.parametrize("new", [1, 2000])
def test_equal_bits_again(new: int) -> None:
    server = new_server(16, 128)
    server.complete(server.call({server.begin(): 9000}))
    call = server.call({0: new})
    first = attend(server, call, 8)
    assert all(torch.equal(first, attend(server, call, 8)) for _ in range(4))


@pytest.mark.parametrize("new", [1, 2000])
def test_waits_for_nothing_and_copies_no_cache(
    new: int, no_waiting: Callable[[], AbstractContextManager[None]]
) -> None:
    """The memory of a call is far less than that of the keys and values it could read."""
    server = new_server(16, 128, room=2**18)
    server.complete(server.call({server.begin(): 250_000}))
    call = server.call({0: new})
    server.complete(call)
    moba_paged(**call, top_k=3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        server.complete(call)
        moba_paged(**call, top_k=3)
    cache = 2 * 2 * 250_000 * 2 * 128
    assert torch.cuda.max_memory_allocated() - before < (2e6 if new == 1 else cache / 4)


@pytest.mark.parametrize("wrong", ["call['lengths'] -= 900", "call['block_table'] = call['block_table'][:, :3]"])
def test_lengths_that_cannot_be_are_asserted_against_on_the_device(wrong: str) -> None:
    """In a process of its own: after a device-side assertion, no other kernel runs."""
    program = f"""
import torch
from paging import Server
server = Server(16, 64, torch.bfloat16, 80, 8, 2, 64, "cuda")
call = server.call({{server.begin(): 700}})
server.complete(call)
torch.cuda.synchronize()
print("right", flush=True)
{wrong}
server.complete(call)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("right"), done.stderr
    assert done.returncode != 0
    assert "lengths must count the new tokens" in done.stdout + done.stderr
