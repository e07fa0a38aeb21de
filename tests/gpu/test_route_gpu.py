"""The routing kernels as compiled, on a CUDA device: bf16, the chosen tiles, many programs at once."""

from __future__ import annotations

import pytest
import torch
from routing import assert_wellformed, disagreement, oracle
from torch import Tensor

pytest.importorskip("triton")

from openmoba import moba_select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def select(q: Tensor, k: Tensor, block_size: int, top_k: int, cu_q: Tensor | None = None, cu_k: Tensor | None = None):
    """The choice, with NaN and the largest integer in memory that was allocated and not yet written."""
    torch.use_deterministic_algorithms(True)
    try:
        return moba_select(
            q, k, block_size=block_size, top_k=top_k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, impl="triton"
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("offset", "limit"), [(0.0, 1e-3), (4.0, 5e-3)])
@pytest.mark.parametrize(
    ("width", "block_size", "tokens"), [(128, 128, 32768), (64, 128, 32768), (128, 16, 16384), (256, 64, 16384)]
)
def test_agreement_with_fp64(dtype, offset, limit, width, block_size, tokens):
    q = normal(1, 2048, 8, width, dtype=dtype)
    k = (normal(1, tokens, 2, width, dtype=FP32, seed=1) + offset * normal(width, dtype=FP32, seed=2)).to(dtype)
    selected, expected = select(q, k, block_size, 8), oracle(q, k, block_size, 8)
    assert_wellformed(selected, expected)
    assert disagreement(selected, expected) <= limit


@pytest.mark.parametrize("top_k", [2, 3, 4, 8, 12, 17, 64])
def test_every_number_of_picks(top_k):
    q, k = normal(2, 700, 4, 64), normal(2, 9000, 2, 64, seed=1)
    selected, expected = select(q, k, 32, top_k), oracle(q, k, 32, top_k)
    assert_wellformed(selected, expected)
    assert disagreement(selected, expected) <= 1e-3


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "dtype"),
    [
        (8, 2, 2, BF16),
        (40, 3, 1, BF16),
        (80, 14, 2, BF16),
        (96, 32, 1, BF16),
        (128, 150, 1, BF16),
        (192, 6, 2, BF16),
        (256, 5, 1, BF16),
        (64, 32, 32, FP32),
        (128, 4, 1, FP32),
        (256, 2, 1, FP32),
    ],
)
def test_head_widths_and_groups(width, heads, kv_heads, dtype):
    q, k = normal(2, 333, heads, width, dtype=dtype), normal(2, 4777, kv_heads, width, dtype=dtype, seed=1)
    selected, expected = select(q, k, 20, 5), oracle(q, k, 20, 5)
    assert_wellformed(selected, expected)
    assert disagreement(selected, expected) <= (1e-5 if dtype == FP32 else 1e-3)


@pytest.mark.parametrize("top_k", [3, 8, 40])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_equal_scores_go_to_the_later_block(top_k, dtype):
    """Five blocks of small whole numbers repeat, so that every implementation computes the same scores exactly."""
    q, k = normal(1, 6400, 4, 64).mul(2).round().to(dtype), normal(1, 80, 2, 64, seed=1).mul(2).round().to(dtype)
    k = k.repeat(1, 80, 1, 1)
    assert torch.equal(select(q, k, 16, top_k), oracle(q, k, 16, top_k))


@pytest.mark.parametrize("top_k", [3, 8, 20])
def test_packed_sequences_are_independent(top_k):
    lengths_k = [700, 1, 0, 5003, 33, 8192, 160, 64, 2500]
    lengths_q = [700, 1, 0, 900, 2, 8192, 160, 64, 1]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().cuda() for n in (lengths_q, lengths_k))
    q, k = normal(sum(lengths_q), 6, 128), normal(sum(lengths_k), 2, 128, seed=1)
    selected, expected = select(q, k, 16, top_k, cu_q, cu_k), oracle(q, k, 16, top_k, cu_q, cu_k)
    assert_wellformed(selected, expected)
    assert disagreement(selected, expected) <= 1e-3


@pytest.mark.parametrize("stride", [32, 64, 1])
@pytest.mark.parametrize("top_k", [8, 12])
def test_best_blocks_that_share_a_lane(stride, top_k):
    """Every row needs the second look: its sixteen best blocks sit in one or two lanes, or side by side."""
    k = 0.1 * normal(1, 16 * 1200, 1, 64, dtype=FP32)
    best = torch.arange(16, device="cuda") * stride + 7
    rank = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to("cuda")
    k.view(1200, 16, 64)[best, :, 0] += 10.0 + rank[:, None]
    q = 0.05 * normal(1, 3000, 4, 64, dtype=FP32, seed=1)
    q[..., 0] = 1
    expected = best[rank.argsort(descending=True)][: top_k - 1].int()
    selected = select(q.to(BF16), k.to(BF16), 16, top_k)
    assert torch.equal(selected, expected.expand_as(selected))


def test_same_bits_every_time():
    q, k = normal(1, 8192, 8, 64), normal(1, 32768, 2, 64, seed=1)
    first = select(q, k, 16, 8)
    assert all(torch.equal(select(q, k, 16, 8), first) for _ in range(3))


@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
def test_later_keys_change_nothing_before_them(value):
    q, k = normal(1, 8192, 4, 64), normal(1, 8192, 2, 64, seed=1)
    before = select(q, k, 32, 8)
    k[0, 4096:4100] = value
    after = select(q, k, 32, 8)
    assert torch.equal(after[0, :4100], before[0, :4100])
    own = torch.arange(8192, device="cuda") // 32
    assert (after >= -1).all()
    assert (after < own[None, :, None, None]).all()


def test_no_host_synchronisation(no_waiting):
    q, k = normal(1, 4096, 4, 64), normal(1, 4096, 2, 64, seed=1)
    select(q, k, 32, 8)
    with no_waiting():
        select(q, k, 32, 8)
