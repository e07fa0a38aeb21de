"""The decode kernels in Triton's interpreter, against fp64. bf16 and CUDA graphs run in tests/gpu only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attending import INTERPRETED
from torch import Tensor

pytest.importorskip("triton")

from openmoba import complete_pages, moba_decode, moba_select, new_centroids
from openmoba.ops.arguments import KeyCache
from openmoba.ops.reference import attention_given_selection
from openmoba.ops.triton import decode as kernels
from openmoba.ops.triton import pages as page_kernels
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.pool import pool

pytestmark = INTERPRETED

FP16, FP32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _no_plans_of_other_tests() -> None:
    kernels._launches.cache_clear()


@pytest.fixture(params=[1, 80], ids=["whole-pages", "pieces"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few programs as there are query rows, or so many that pages are cut."""
    monkeypatch.setattr(kernels, "_PROGRAMS_PER_MULTIPROCESSOR", request.param)


class Cache:
    """Tokens of some rows in a cache, head-major in memory; NaN in the slots and pages that must not be read."""

    def __init__(self, randn: Any, lengths: list[int], starts: list[int], kv_heads: int, width: int, block_size: int):
        self.lengths, self.starts = (torch.tensor(x, dtype=torch.int32) for x in (lengths, starts))
        slots = max(length + start for length, start in zip(lengths, starts, strict=True)) + 3
        self.k, self.v = (randn(len(lengths), kv_heads, slots, width).transpose(1, 2) for _ in range(2))
        self.block_size = block_size
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for x in (self.k, self.v):
                x[row, :start] = torch.nan
                x[row, start + length :] = torch.nan

    def centroids(self, dtype: torch.dtype) -> Tensor:
        """Of the complete pages of keys in `dtype`; one page more than any row has."""
        k = self.k.to(dtype)
        slots = (int(self.lengths.max()) // self.block_size + 1) * self.block_size
        centroids = new_centroids(k, slots, self.block_size)
        complete_pages(centroids, k, self.lengths, self.starts, slots, self.block_size)
        return centroids

    def decode(self, q: Tensor, top_k: int, **options: Any) -> Tensor:
        """The kernels' result for keys and values in q's dtype."""
        caches = (self.k.to(q.dtype), self.v.to(q.dtype), self.centroids(q.dtype))
        settings = {"block_size": self.block_size, "top_k": top_k, "impl": "triton"} | options
        return moba_decode(q, *caches, self.lengths, self.starts, **settings)

    def expected(self, q: Tensor, top_k: int) -> Tensor:
        """The same in fp64, by torch operations, on the same values."""
        k, v = (x.to(q.dtype).double() for x in (self.k, self.v))
        centroids = self.centroids(q.dtype).double()
        settings: dict[str, Any] = {"block_size": self.block_size, "top_k": top_k}
        return moba_decode(q.double(), k, v, centroids, self.lengths, self.starts, **settings)


def assert_rounded(out: Tensor, expected: Tensor) -> None:
    """No further from fp64 than rounding the output, and the fp32 sums."""
    eps = torch.finfo(out.dtype).eps + 8 * torch.finfo(FP32).eps
    assert (out.double() - expected).norm() <= eps * expected.norm()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("dtype", "queries", "heads", "kv_heads", "width", "block_size", "top_k"),
    [
        (FP32, 1, 4, 1, 16, 16, 3),
        (FP16, 1, 3, 3, 40, 16, 2),
        (FP16, 3, 3, 1, 16, 8, 4),
        (FP32, 2, 2, 2, 8, 48, 2),
        (FP32, 1, 2, 1, 16, 16, 1),
        (FP16, 1, 2, 1, 16, 72, 1),
        (FP16, 1, 2, 1, 16, 16, 50),
        (FP32, 1, 2, 1, 16, 1, 5),
        (FP32, 16, 1, 1, 16, 16, 2),
    ],
)
def test_rows_at_block_borders(randn, dtype, queries, heads, kv_heads, width, block_size, top_k):
    """Rows of B - 1, B, B + 1 and more tokens, begun at any slot, as the only ones or beside others."""
    lengths = [block_size, block_size + 1, 5 * block_size + 3, 4 * block_size - 1]
    cache = Cache(randn, [max(queries, length) for length in lengths], [0, 7, 2, 0], kv_heads, width, block_size)
    q = randn(4, queries, heads, width, dtype=dtype)
    out = cache.decode(q, top_k)
    assert out.dtype == dtype
    assert_rounded(out, cache.expected(q, top_k))


def test_more_query_rows_than_a_tile_of_scores(randn):
    cache = Cache(randn, [70, 16], [0, 0], 1, 16, 16)
    q = randn(2, 16, 5, 16, dtype=FP32)
    assert_rounded(cache.decode(q, 3), cache.expected(q, 3))


def test_wide_heads_are_scored_in_steps(randn):
    cache = Cache(randn, [70], [0], 1, 200, 16)
    q = randn(1, 1, 2, 200, dtype=FP32)
    assert_rounded(cache.decode(q, 3), cache.expected(q, 3))


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("lanes", [(16,), (16, 64)])
def test_pages_in_registers_and_more_than_that(randn, monkeypatch, lanes):
    monkeypatch.setattr(kernels, "_LANES", lanes)
    cache = Cache(randn, [200, 63, 64], [0, 1, 0], 2, 16, 4)
    cache.k[:, 60:100] = cache.k[:, 20:60]  # equal pages
    q = randn(3, 1, 4, 16, dtype=FP32)
    for top_k in (2, 6, 51):
        assert_rounded(cache.decode(q, top_k), cache.expected(q, top_k))


@pytest.mark.usefixtures("programs")
def test_equal_bits_again(randn):
    cache = Cache(randn, [200, 63], [0, 1], 2, 16, 16)
    q = randn(2, 1, 4, 16, dtype=FP16)
    assert torch.equal(cache.decode(q, 4), cache.decode(q, 4))


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_the_choice_of_prefill(randn, offset):
    """The last query of a prefill and a decoding step read the same blocks, on the same 16-bit keys."""
    tokens, block_size, top_k = 400, 8, 5
    q, k, v = (randn(2, tokens, heads, 16, dtype=FP16) for heads in (4, 2, 2))
    k += offset * randn(16, dtype=FP16)
    selected = moba_select(q, k, block_size=block_size, top_k=top_k, impl="triton")
    given = attention_given_selection(*(x.double() for x in (q, k, v)), selected, block_size, 0.25)
    lengths = torch.full((2,), tokens, dtype=torch.int32)
    centroids = new_centroids(k, tokens, block_size)
    page_kernels.complete_pages(KeyCache(centroids, k, lengths, None, block_size), tokens)
    out = moba_decode(q[:, -16:], k, v, centroids, lengths, block_size=block_size, top_k=top_k, impl="triton")
    assert_rounded(out, given[:, -16:])


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize(("block_size", "width"), [(1, 16), (16, 40), (100, 24)])
def test_bits_of_pages_are_those_of_prefill(randn, block_size, width, dtype):
    """In one go, in chunks, or token by token, in rows that begin and end anywhere."""
    lengths, starts = [203, 100, 0, 99], [0, 7, 5, 104]
    cache = Cache(randn, lengths, starts, 2, width, block_size)
    k, ends = cache.k.to(dtype), cache.starts + cache.lengths
    slots = k.shape[1]
    once, in_steps = (new_centroids(k, slots, block_size) for _ in range(2))
    page_kernels.complete_pages(KeyCache(once, k, cache.lengths, cache.starts, block_size), 2 * slots)
    begin = 0
    for end in (99, 100, 101, 102, 180, 203):
        seen = torch.minimum(ends, torch.full_like(ends, end)) - cache.starts
        page_kernels.complete_pages(KeyCache(in_steps, k, seen.clamp(min=0), cache.starts, block_size), end - begin)
        begin = end
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        whole = length // block_size
        keys = k[row : row + 1, start : start + length]
        if length:
            geometry = Geometry.of(keys, keys, None, block_size, 2)
            expected = pool(keys, None, geometry)[0][:, :whole, :width].transpose(0, 1)
            assert torch.equal(once[row, :whole], expected)
            assert torch.equal(in_steps[row, :whole], expected)
            if dtype == FP32:
                torch.testing.assert_close(cache.centroids(dtype)[row, :whole], expected)
        assert once[row, whole:].isnan().all()


def test_pages_without_padding(randn):
    k = randn(2, 33, 1, 16, dtype=FP16)
    centroids, like = (new_centroids(k, 33, 16) for _ in range(2))
    lengths = torch.tensor([33, 16], dtype=torch.int32)
    page_kernels.complete_pages(KeyCache(centroids, k, lengths, None, 16), 33)
    page_kernels.complete_pages(KeyCache(like, k, lengths, torch.zeros_like(lengths), 16), 33)
    assert torch.equal(centroids.nan_to_num(-1), like.nan_to_num(-1))
    assert centroids[1, 1].isnan().all()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_scale_of_queries_changes_no_choice(randn, factor):
    cache = Cache(randn, [100], [0], 1, 16, 4)
    q = randn(1, 1, 2, 16, dtype=FP32)
    scaled = cache.decode(factor * q, 3, scale=0.25 / factor)
    torch.testing.assert_close(scaled, cache.decode(q, 3, scale=0.25))


def test_queries_before_the_first_token_are_zero(randn):
    cache = Cache(randn, [2, 0, 20], [18, 20, 0], 1, 16, 4)
    q = randn(3, 4, 2, 16, dtype=FP32)
    out = cache.decode(q, 3)
    assert out[0, :2].eq(0).all()
    assert out[1].eq(0).all()
    assert_rounded(out, cache.expected(q, 3))


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_ties_go_to_the_later_page(randn, factor):
    cache = Cache(randn, [22], [0], 1, 16, 4)
    cache.k[:, :20] = cache.k[:, :4].repeat(1, 5, 1, 1)
    q = factor * randn(1, 1, 2, 16, dtype=FP32)
    later = Cache(randn, [10], [0], 1, 16, 4)
    later.k, later.v = cache.k[:, 12:], cache.v[:, 12:]
    assert_rounded(cache.decode(q, 3), later.expected(q, 3))


def test_large_logits(randn):
    cache = Cache(randn, [40, 7], [0, 0], 1, 16, 8)
    q = 1e4 * randn(2, 2, 2, 16, dtype=FP32)
    torch.testing.assert_close(cache.decode(q, 3).double(), cache.expected(q, 3), rtol=1e-2, atol=1e-3)


def test_scale(randn):
    cache = Cache(randn, [40], [0], 1, 16, 8)
    q = randn(1, 1, 2, 16, dtype=FP32)
    assert torch.equal(cache.decode(q, 3, scale=0.5), cache.decode(2 * q, 3))


def test_strided_queries(randn):
    cache = Cache(randn, [40, 30], [0, 3], 2, 16, 8)
    q = randn(2, 4, 3, 32, dtype=FP32).transpose(1, 2)
    for strided in (q[..., 8:24], q[..., ::2]):
        assert torch.equal(cache.decode(strided, 3), cache.decode(strided.contiguous(), 3))


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 3], dtype=torch.int32)])
def test_in_a_compiled_graph(randn, starts):
    cache = Cache(randn, [40, 30], [0, 3 if starts is not None else 0], 2, 16, 8)
    caches = (cache.k.to(FP32), cache.v.to(FP32), cache.centroids(FP32))
    q = randn(2, 1, 4, 16, dtype=FP32)

    def step(q: Tensor, lengths: Tensor) -> Tensor:
        return 2 * moba_decode(q, *caches, lengths, starts, block_size=8, top_k=3, impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, cache.lengths), step(q, cache.lengths))
    keys, values, centroids = caches
    settings = ("triton", q, centroids, keys, cache.lengths, starts, 8, values, 3, 0.25)
    torch.library.opcheck(torch.ops.openmoba.decode, settings)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 3], dtype=torch.int32)])
def test_the_registered_operation_completes_pages(randn, starts):
    k = randn(2, 2, 43, 16, dtype=FP32).transpose(1, 2)
    lengths, centroids = torch.tensor([40, 30], dtype=torch.int32), new_centroids(k, 43, 8).zero_()
    expected = centroids.clone()
    page_kernels.complete_pages(KeyCache(expected, k, lengths, starts, 8), 17)
    torch.ops.openmoba.write_pages("triton", centroids, k, lengths, starts, 8, 17)
    assert torch.equal(centroids, expected)
    torch.library.opcheck(torch.ops.openmoba.write_pages, ("triton", centroids, k, lengths, starts, 8, 17))


@pytest.mark.parametrize("rows", [1, 3, 32, 512, 4096])
@pytest.mark.parametrize(("block_size", "top_k"), [(128, 8), (512, 3), (4096, 12), (1, 64), (100, 1)])
def test_shares_cover_the_pages_once(rows, block_size, top_k):
    tile = kernels.keys_per_tile(block_size, 128, itemsize=2)
    ranks, piece = kernels.portion_of(rows, block_size, top_k, tile, 132)
    shares = -(-top_k // ranks) * -(-block_size // piece)
    assert ranks == 1 or piece == block_size
    assert (piece % tile == 0) or piece == block_size
    finest = top_k * -(-block_size // tile)
    assert min(finest, 132 * 2) <= shares * rows
    assert shares == 1 or shares * rows <= 132 * 4 * 2 + rows * top_k


def test_what_triton_cannot_run(randn):
    cache = Cache(randn, [40], [0], 1, 16, 8)
    q = randn(1, 1, 2, 16, dtype=FP32)
    with pytest.raises(ValueError, match="impl must be one of"):
        cache.decode(q, 3, impl="cuda")
    with pytest.raises(ValueError, match="float64"):
        moba_decode(
            q.double(), cache.k, cache.v, cache.centroids(FP32).double(), cache.lengths,
            block_size=8, top_k=3, impl="triton",
        )  # fmt: skip
    with pytest.raises(ValueError, match="v_cache's last dimension must be contiguous"):
        moba_decode(
            q, cache.k.float(), torch.zeros(1, 43, 1, 32)[..., ::2], cache.centroids(FP32), cache.lengths,
            block_size=8, top_k=3, impl="triton",
        )  # fmt: skip
