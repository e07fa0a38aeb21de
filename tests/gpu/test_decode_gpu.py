"""The decode kernels on a card: 16 bits, CUDA graphs over a growing cache, compiled steps, the choice against fp64.

The kernels run in poisoned memory: `torch.empty` returns NaN and the largest integer.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from attending import poisoned_memory
from torch import Tensor

from openmoba import complete_pages, moba_decode, moba_select, new_centroids
from openmoba.bench.timing import replayed
from openmoba.ops.reference import attention_given_selection
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.pool import pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Cache:
    """Random tokens after `starts`, head-major, and the centroids of all pages."""

    def __init__(self, batch: int, slots: int, kv_heads: int, width: int, block_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device="cuda").to(dtype).transpose(1, 2)

        self.randn, self.block_size = randn, block_size
        self.k, self.v = (randn(batch, kv_heads, slots, width) for _ in range(2))
        self.starts = torch.arange(batch, dtype=torch.int32, device="cuda") * 5
        self.complete()

    def complete(self) -> None:
        """Centroids of all pages."""
        slots = self.k.shape[1]
        with poisoned_memory():
            self.centroids = new_centroids(self.k, slots, self.block_size)
        complete_pages(self.centroids, self.k, slots - self.starts, self.starts, slots, self.block_size)

    def means(self) -> Tensor:
        """The pages' means in fp64, without the shift and the scale of centroids."""
        pages = self.k.shape[1] // self.block_size
        means = torch.zeros(self.k.shape[0], pages, *self.k.shape[2:], dtype=torch.float64, device="cuda")
        for row, start in enumerate(self.starts.tolist()):
            whole = (self.k.shape[1] - start) // self.block_size
            keys = self.k[row, start : start + whole * self.block_size].double()
            means[row, :whole] = keys.unflatten(0, (whole, self.block_size)).mean(1)
        return means

    def decode(self, q: Tensor, lengths: Tensor, top_k: int) -> Tensor:
        caches = (self.k, self.v, self.centroids, lengths, self.starts)
        with nullcontext() if torch.compiler.is_compiling() else poisoned_memory():
            return moba_decode(q, *caches, block_size=self.block_size, top_k=top_k)

    def expected(self, q: Tensor, lengths: Tensor, top_k: int, centroids: Tensor | None = None) -> Tensor:
        """In fp64, chosen by these centroids, by default the cache's."""
        centroids = self.centroids.double() if centroids is None else centroids
        caches = (self.k.double(), self.v.double(), centroids, lengths, self.starts)
        return moba_decode(q.double(), *caches, block_size=self.block_size, top_k=top_k)


def far_off(out: Tensor, expected: Tensor) -> float:
    """Share of the queries that are further from fp64 than rounding, as those are that read another page."""
    error = (out.double() - expected).norm(dim=-1)
    return float((error > (torch.finfo(out.dtype).eps + 1e-5) * expected.norm(dim=-1)).double().mean())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "kv_heads", "width", "block_size", "top_k"),
    [
        (1, 1, 32, 8, 128, 128, 8),
        (3, 1, 32, 8, 128, 512, 3),
        (2, 16, 32, 8, 64, 128, 8),
        (5, 3, 9, 3, 80, 32, 16),
        (2, 2, 4, 4, 256, 64, 4),
        (2, 5, 7, 1, 40, 20, 6),
        (4, 1, 8, 1, 128, 128, 1),
        (40, 1, 32, 32, 16, 16, 40),
        (1, 16, 32, 1, 128, 16, 64),
    ],
)
def test_against_fp64(dtype, batch, queries, heads, kv_heads, width, block_size, top_k):
    cache = Cache(batch, 4200, kv_heads, width, block_size, dtype)
    q = cache.randn(batch, heads, queries, width)
    for length in (4200 - 5 * batch, 2 * block_size - 1, 2 * block_size, 2 * block_size + 1, queries):
        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        lengths -= torch.arange(batch, dtype=torch.int32, device="cuda") % max(1, length - queries)
        assert far_off(cache.decode(q, lengths, top_k), cache.expected(q, lengths, top_k)) <= 1e-3


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_choice_over_many_pages(offset):
    """At most 0.1 % of the picks differ from fp64, 0.5 % with an offset common to all keys."""
    cache = Cache(4, 65536, 2, 128, 16, BF16)
    cache.k += (offset * torch.randn(128, device="cuda")).to(BF16)
    cache.complete()
    q, lengths = cache.randn(4, 64, 16, 128), 65536 - cache.starts
    assert far_off(cache.decode(q, lengths, 2), cache.expected(q, lengths, 2, cache.means())) <= (
        5e-3 if offset else 1e-3
    )


@pytest.mark.parametrize("pages", [1000, 1024, 1025, 4096, 4097, 9000])
def test_pages_in_registers_and_more_than_that(pages):
    """Of whole numbers, whose scores are exact and often equal: the later page on a tie."""
    cache = Cache(2, 4 * pages, 1, 64, 4, BF16)
    cache.k.round_()
    cache.complete()
    q, lengths = cache.randn(2, 32, 1, 64).round(), 4 * pages - cache.starts
    assert far_off(cache.decode(q, lengths, 12), cache.expected(q, lengths, 12)) == 0


@pytest.mark.parametrize("tokens", [4096, 40000])
def test_scores_that_are_not_numbers_stay_in_the_cache(tokens):
    """A NaN of all ones sorts below every number."""
    cache = Cache(2, tokens, 1, 64, 4, FP32)
    q = torch.full((2, 1, 4, 64), -1, dtype=torch.int32, device="cuda").view(FP32)
    assert cache.decode(q, tokens - cache.starts, 8).isnan().all()


@pytest.mark.parametrize(("block_size", "top_k"), [(128, 8), (32, 16)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_choice_of_prefill(dtype, block_size, top_k):
    """The last queries of a prefill and a decoding step read the same blocks, up to ties in the last bits."""
    cache = Cache(1, 8000, 2, 128, block_size, dtype)
    q = cache.randn(1, 8, 16, 128)
    selected = moba_select(q, cache.k, block_size=block_size, top_k=top_k)
    given = attention_given_selection(*(x.double() for x in (q, cache.k, cache.v)), selected, block_size, 128**-0.5)
    assert far_off(cache.decode(q, 8000 - cache.starts, top_k), given) <= 1 / 128


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("block_size", "width"), [(128, 128), (512, 64), (20, 80), (1, 16)])
def test_bits_of_pages_are_those_of_prefill(dtype, block_size, width):
    """In one go, in chunks, or token by token."""
    cache = Cache(3, 2100, 2, width, block_size, dtype)
    in_steps = new_centroids(cache.k, 2100, block_size).fill_(torch.nan)
    begin = 0
    for end in (3, 700, 1030, *range(1031, 1300), 2099, 2100):
        lengths = (end - cache.starts).clamp(min=0)
        complete_pages(in_steps, cache.k, lengths, cache.starts, end - begin, block_size)
        begin = end
    for row, start in enumerate(cache.starts.tolist()):
        keys = cache.k[row : row + 1, start:]
        whole = keys.shape[1] // block_size
        prefill = pool(keys, None, Geometry.of(keys, keys, None, block_size, 2))[0][:, :whole, :width].transpose(0, 1)
        assert torch.equal(cache.centroids[row, :whole], prefill)
        assert torch.equal(in_steps[row, :whole], prefill)
        assert in_steps[row, whole:].isnan().all()


def test_cuda_graph_over_a_growing_cache():
    """One capture, replayed while tokens arrive: across block borders, one row behind the others."""
    cache = Cache(2, 300, 2, 64, 16, BF16)
    keys, values, known = cache.k.clone(), cache.v.clone(), cache.centroids
    cache.centroids = new_centroids(cache.k, 300, 16)
    end = torch.zeros((), dtype=torch.int64, device="cuda")
    k_new, v_new, q = (torch.zeros_like(x) for x in (keys[:, :1], values[:, :1], keys[:, :1].repeat(1, 1, 4, 1)))

    def step() -> Tensor:
        cache.k.index_copy_(1, end[None], k_new)
        cache.v.index_copy_(1, end[None], v_new)
        end.add_(1)
        lengths = (end - cache.starts).int()
        complete_pages(cache.centroids, cache.k, lengths, cache.starts, 1, 16)
        return cache.decode(q, lengths, 3)

    replay = replayed(step)
    for x in (cache.k, cache.v, cache.centroids):
        x.fill_(torch.nan)
    end.zero_()
    queries = cache.randn(2, 8, 300, 64)
    for t in range(300):
        k_new.copy_(keys[:, t : t + 1])
        v_new.copy_(values[:, t : t + 1])
        q.copy_(queries[:, t : t + 1])
        out = replay()
        if t in (0, 4, 5, 15, 16, 17, 20, 21, 22, 100, 255, 256, 299):
            lengths = t + 1 - cache.starts
            whole = Cache.__new__(Cache)
            whole.__dict__ |= vars(cache) | {"k": keys, "v": values, "centroids": known}
            assert far_off(out, whole.expected(q, lengths, 3)) == 0
    for row, start in enumerate(cache.starts.tolist()):
        complete = (300 - start) // 16
        assert torch.equal(cache.centroids[row, :complete], known[row, :complete])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_step(mode):
    cache = Cache(2, 600, 2, 64, 16, BF16)

    @torch.compile(fullgraph=True, mode=mode)
    def step(q: Tensor, lengths: Tensor) -> Tensor:
        return 2 * cache.decode(q + 1, lengths, 4)

    q = cache.randn(2, 8, 1, 64)
    for length in (590, 17, 300):
        lengths = torch.full((2,), length, dtype=torch.int32, device="cuda")
        assert torch.equal(step(q, lengths), 2 * cache.decode(q + 1, lengths, 4))


def test_equal_bits_again():
    cache = Cache(3, 9000, 8, 128, 128, BF16)
    q, lengths = cache.randn(3, 32, 4, 128), 8900 - cache.starts
    first = cache.decode(q, lengths, 8)
    assert all(torch.equal(first, cache.decode(q, lengths, 8)) for _ in range(5))


def test_waits_for_nothing_and_takes_little_memory(no_waiting):
    cache = Cache(1, 2**17, 8, 128, 128, BF16)
    q = cache.randn(1, 32, 1, 128)
    lengths = torch.full((1,), 2**17, dtype=torch.int32, device="cuda")
    cache.decode(q, lengths, 8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        cache.decode(q, lengths, 8)
    assert torch.cuda.max_memory_allocated() - before < 2e6
