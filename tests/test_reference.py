"""The specification, checked by hand and against its own limits."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from openmoba import moba_attention, moba_select
from openmoba.ops.reference import (
    _power_of_two,
    attention_mask,
    attention_over,
    block_centroids,
    block_scores,
    choose_blocks,
    reference_merge,
)

REFERENCE = {"impl": "reference"}


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def test_six_tokens_by_hand():
    """Blocks {0,1}, {2,3}, {4,5}; query 4 prefers block 1, query 5 block 0; one key per dimension."""
    k = torch.zeros(1, 6, 1, 8, dtype=torch.float64)
    k[0, 0:2, 0, 0] = torch.tensor([1.0, 3.0])  # centroid 2 on axis 0
    k[0, 2:4, 0, 1] = torch.tensor([2.0, 4.0])  # centroid 3 on axis 1
    q = torch.zeros(1, 6, 1, 8, dtype=torch.float64)
    q[0, 4, 0, 1] = 1.0
    q[0, 5, 0, 0] = 1.0
    v = torch.arange(6, dtype=torch.float64)[None, :, None, None].expand(1, 6, 1, 8)

    selected = moba_select(q, k, block_size=2, top_k=2, **REFERENCE)[0, :, 0, 0]
    assert selected.tolist() == [-1, -1, 0, 0, 1, 0]

    out = moba_attention(q, k, v, block_size=2, top_k=2, scale=1.0, **REFERENCE)[0, :, 0, 0]
    e = math.exp
    row_4 = (2 * e(2) + 3 * e(4) + 4 * 1) / (e(2) + e(4) + 1)
    row_5 = (0 * e(1) + 1 * e(3) + 4 + 5) / (e(1) + e(3) + 2)
    expected = torch.tensor([0.0, 0.5, 1.0, 1.5, row_4, row_5], dtype=torch.float64)
    torch.testing.assert_close(out, expected)


def test_any_finite_score_is_one():
    assert choose_blocks(torch.tensor([-3e38, -math.inf, 1.0]).view(1, 1, 1, 3), 4).tolist() == [[[[2, 0, -1]]]]


def test_scales_of_centroids_are_normal_powers_of_two():
    x = torch.tensor([0.0, 1e-42, 0.75, 1.0, 3e38])
    assert _power_of_two(x).tolist() == [1.0, 2.0**127, 2.0, 1.0, 2.0**-126]


@pytest.mark.parametrize("tokens", [1, 5, 7, 8, 23])
@pytest.mark.parametrize("block_size", [1, 3, 7])
def test_enough_blocks_is_dense(randn, tokens, block_size):
    q, k, v = randn(2, tokens, 6, 8), randn(2, tokens, 3, 8), randn(2, tokens, 3, 8)
    top_k = -(-tokens // block_size)
    torch.testing.assert_close(moba_attention(q, k, v, block_size=block_size, top_k=top_k, **REFERENCE), dense(q, k, v))


def test_one_block_is_block_local(randn):
    q, k, v = randn(1, 13, 2, 8), randn(1, 13, 2, 8), randn(1, 13, 2, 8)
    out = moba_attention(q, k, v, block_size=5, top_k=1, **REFERENCE)
    local = torch.cat([dense(q[:, a : a + 5], k[:, a : a + 5], v[:, a : a + 5]) for a in (0, 5, 10)], dim=1)
    torch.testing.assert_close(out, local)


def test_ties_go_to_the_later_block(randn):
    q, k = randn(1, 12, 1, 8), randn(1, 1, 1, 8).expand(1, 12, 1, 8)
    selected = moba_select(q, k, block_size=2, top_k=3, **REFERENCE)[0, :, 0]
    assert selected[10].tolist() == [4, 3]
    assert selected[2].tolist() == [0, -1]


def test_scores_are_unscaled_and_only_of_past_blocks(randn):
    q, k = randn(1, 9, 4, 8), randn(1, 9, 2, 8)
    score = block_scores(q, k, 2)
    assert score.shape == (1, 9, 4, 4)
    torch.testing.assert_close(score[0, 8, 3, 1], q[0, 8, 3] @ k[0, 2:4, 1].mean(0))
    assert (score > -math.inf)[0, :, 0].sum(-1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_centroids_sum_in_float32():
    """256 keys of 1 + 2^-7 sum exactly in fp32; a bf16 running sum would stall."""
    k = torch.full((1, 256, 1, 8), 1 + 2**-7, dtype=torch.bfloat16)
    assert torch.equal(block_centroids(k, 256), torch.full((1, 1, 1, 8), 1 + 2**-7))


def test_mask_counts_own_block_as_one_of_top_k(randn):
    q, k = randn(1, 11, 1, 8), randn(1, 11, 1, 8)
    selected = choose_blocks(block_scores(q, k, 3), 2)
    reads = attention_mask(selected, 11, 3).sum(-1)[0, 0]
    assert reads.tolist() == [1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5]


def test_packed_equals_separate(randn):
    lengths = [0, 5, 1, 0, 9]
    total = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = randn(total, 6, 8), randn(total, 2, 8), randn(total, 2, 8)
    packed = moba_attention(q, k, v, block_size=2, top_k=2, cu_seqlens_q=cu, cu_seqlens_k=cu, **REFERENCE)
    alone = [
        moba_attention(q[None, a:b], k[None, a:b], v[None, a:b], block_size=2, top_k=2, **REFERENCE)[0]
        for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


@pytest.mark.parametrize("cut", [1, 3, 4, 8, 10])
def test_any_chunking_equals_one_pass(randn, cut):
    q, k, v = randn(2, 11, 4, 8), randn(2, 11, 2, 8), randn(2, 11, 2, 8)
    whole = moba_attention(q, k, v, block_size=3, top_k=2, **REFERENCE)
    first = moba_attention(q[:, :cut], k[:, :cut], v[:, :cut], block_size=3, top_k=2, **REFERENCE)
    rest = moba_attention(q[:, cut:], k, v, block_size=3, top_k=2, **REFERENCE)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)


def test_gradients_against_finite_differences(randn):
    q, k, v = (randn(1, 7, heads, 8, grad=True) for heads in (2, 1, 1))
    assert torch.autograd.gradcheck(
        lambda q, k, v: moba_attention(q, k, v, block_size=2, top_k=2, **REFERENCE), (q, k, v)
    )


def test_a_list_in_any_order_with_repeats_and_none():
    """Six tokens in blocks of two; the last two queries list blocks 1, none, 1, 0 and none, 0, none, none."""
    lists = torch.tensor([[-1, -1, -1, -1]] * 4 + [[1, -1, 1, 0], [-1, 0, -1, -1]], dtype=torch.int32)
    mask = attention_mask(lists[None, :, None], 6, 2)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_the_log_sum_exp_and_merging_by_hand():
    """Of logits 0, log 2 and log 5 the softmax is 1/8, 2/8, 5/8, over log 8; and so it is in two parts."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 5.0]).log()[None, :, None, None]
    v = torch.tensor([8.0, 16.0, 24.0])[None, :, None, None]
    masks = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()[:, None, None, None]
    (out, lse), first, second, none = (attention_over(q, k, v, mask, 1.0) for mask in masks)
    assert out.item() == pytest.approx(1 + 4 + 15)
    assert lse.exp().item() == pytest.approx(8)
    assert first[0].item() == pytest.approx((8 + 5 * 24) / 6)
    assert first[1].exp().item() == pytest.approx(6)
    assert (none[0].item(), none[1].item()) == (0, -math.inf)
    for merged in (
        reference_merge(*zip(first, second, strict=True)),
        reference_merge(*zip(none, second, first, strict=True)),
    ):
        assert [x.item() for x in merged] == [pytest.approx(20), pytest.approx(math.log(8))]
    assert [x.item() for x in reference_merge(*zip(none, none, strict=True))] == [0, -math.inf]
