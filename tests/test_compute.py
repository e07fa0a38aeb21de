"""Costs against a count of what the reference reads."""

from __future__ import annotations

import pytest
import torch
from openmoba.ops.cost import causal_pairs, moba_pairs, moba_scores
from openmoba.ops.reference import attention_mask, block_scores, choose_blocks

SHAPES = [
    (tokens, block_size, top_k)
    for block_size in (1, 7, 16)
    for tokens in (1, block_size - 1, block_size, block_size + 1, 3 * block_size + 2, 61)
    for top_k in (1, 2, 3, 100)
    if tokens > 0
]


@pytest.mark.parametrize(("tokens", "block_size", "top_k"), SHAPES)
def test_pairs_equal_the_ones_of_the_reference_mask(tokens: int, block_size: int, top_k: int) -> None:
    q = torch.randn(1, tokens, 3, 8)
    k = torch.randn(1, tokens, 1, 8)
    selected = choose_blocks(block_scores(q, k, block_size), top_k)
    ones_per_head = attention_mask(selected, tokens, block_size).sum((0, 2, 3))
    assert ones_per_head.tolist() == [moba_pairs(tokens, block_size, top_k)] * 3


@pytest.mark.parametrize(("tokens", "block_size", "top_k"), SHAPES)
def test_scores_count_the_candidates_of_queries_with_a_choice(
    tokens: int, block_size: int, top_k: int
) -> None:
    score_TN = block_scores(torch.randn(1, tokens, 1, 8), torch.randn(1, tokens, 1, 8), block_size)[0, :, 0]
    candidates_T = (score_TN > -torch.inf).sum(-1)
    expected = candidates_T[candidates_T > top_k - 1].sum() if top_k > 1 else 0
    assert moba_scores(tokens, block_size, top_k) == expected


def test_moba_that_reads_everything_costs_what_dense_attention_costs() -> None:
    assert moba_pairs(1000, 64, 16) == causal_pairs(1000)
    assert moba_scores(1000, 64, 16) == 0


def test_long_sequences_follow_the_published_complexity() -> None:
    tokens, block_size, top_k = 1 << 20, 128, 8
    blocks = tokens // block_size
    assert moba_pairs(tokens, block_size, top_k) == pytest.approx(
        tokens * ((top_k - 1) * block_size + block_size / 2), rel=1e-2
    )
    assert moba_scores(tokens, block_size, top_k) == pytest.approx(tokens * blocks / 2, rel=1e-2)


def test_bad_costs_name_the_value() -> None:
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        moba_pairs(10, 4, 0)
    with pytest.raises(ValueError, match="tokens must be >= 0, got -1"):
        moba_scores(-1, 4, 2)
