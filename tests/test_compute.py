"""Costs against a count of what the reference reads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from openmoba import MobaConfig
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import ModelConfig
from openmoba.lab.measure.compute import PFLOPS_DAY, Shape, attention_flops, training_compute
from openmoba.lab.model.build import SIZES, build_model
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
def test_scores_count_the_candidates_of_queries_with_a_choice(tokens: int, block_size: int, top_k: int) -> None:
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


SHAPE = Shape(total=1100, non_embedding=1000, hidden=8, layers=3, heads=2, head_dim=4, vocab=10, length=32)


def test_parameters_are_counted_with_and_without_embeddings() -> None:
    size = SIZES["nano"]
    layer = 4 * size.hidden**2 + 3 * size.hidden * size.feed_forward + 2 * size.hidden
    inner = size.layers * layer + size.hidden
    for tied, tables in ((True, 1), (False, 2)):
        model = build_model(ModelConfig(size="nano", overrides={"tie_word_embeddings": tied}), 300, 32, 0)
        shape = Shape.of(model, 32)
        assert shape.parameters == {"total": inner + tables * 320 * size.hidden, "non_embedding": inner}
        assert (shape.vocab, shape.layers, shape.heads, shape.head_dim) == (320, 2, 2, 32)


@pytest.mark.parametrize(("family", "overrides", "width"), [("qwen3", {"head_dim": 16}, 16), ("gpt2", {}, 32)])
def test_heads_are_as_wide_as_the_model_says(family: str, overrides: dict[str, int], width: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(family, "nano", {**overrides}), 300, 32, 0)
    assert Shape.of(model, 32).head_dim == width


def test_published_sizes_have_the_published_parameter_counts() -> None:
    for name, billions in (("545m", 0.545), ("822m", 0.822), ("1.1b", 1.1), ("1.5b", 1.5), ("2.1b", 2.1)):
        size = SIZES[name]
        count = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.feed_forward)
        assert count / 1e9 == pytest.approx(billions, rel=0.015)
        assert size.hidden == 128 * size.heads == 128 * size.layers


def test_compute_by_hand_in_all_conventions() -> None:
    """2 steps of 5 windows of 32 tokens: 320 tokens."""
    assert PFLOPS_DAY == 1e15 * 24 * 3600
    row = training_compute(SHAPE, ArmConfig("full"), 2, 4, 5, seconds=7.0)
    assert row["6nd"] * PFLOPS_DAY == pytest.approx(6 * 1000 * 320)
    # per token and layer: 4*2*4*32 for scores and their sum of values, 3*2*32 for the softmax
    assert row["chinchilla"] * PFLOPS_DAY == pytest.approx(3 * 320 * (2000 + 4 * 80 + 3 * (1024 + 192)))
    # per window and layer: 2 heads * 528 pairs * 4*4 operations, three times with the backward pass
    assert row["causal_exact"] * PFLOPS_DAY == pytest.approx(3 * 320 * (2000 + 160) + 10 * 3 * 3 * 2 * 528 * 16)
    assert row["accelerator_seconds"] == 7.0
    # Of 8 blocks: 10 pairs within each, 4 * 4 more in all but the first, and a choice among 2 to 7 centroids, of which
    # no gradient is made.
    pairs, scores = 8 * 10 + 7 * 16, 4 * (2 + 3 + 4 + 5 + 6 + 7)
    assert attention_flops(SHAPE, MobaConfig(4, 2)) == 3 * 2 * (pairs * 3 * 16 + scores * 8)


def test_arms_differ_in_exact_compute_alone() -> None:
    arms = [ArmConfig(name, 4, 2) for name in ("moba", "time_hybrid", "hybrid", "full")]  # type: ignore[arg-type]
    rows = [training_compute(SHAPE, arm, 100, 100, 5, 0.0) for arm in arms]
    for convention in ("6nd", "chinchilla"):
        assert len({row[convention] for row in rows}) == 1
    exact = [row["causal_exact"] for row in rows]
    assert exact == sorted(set(exact))
    moba, timed, hybrid, full = exact
    assert timed == pytest.approx(0.9 * moba + 0.1 * full)
    assert hybrid == pytest.approx((2 * moba + full) / 3)


def test_compute_of_a_warm_start_is_that_of_full_attention_first() -> None:
    arm = ArmConfig("moba", 4, 2, warm_start=0.5)
    curve = [training_compute(SHAPE, arm, step, 10, 1, 0.0)["causal_exact"] for step in range(11)]
    increments = [round((b - a) * PFLOPS_DAY) for a, b in pairwise(curve)]
    assert len(set(increments[:5])) == len(set(increments[5:])) == 1
    assert increments[4] - increments[5] == attention_flops(SHAPE, None) - attention_flops(SHAPE, MobaConfig(4, 2))


def test_compute_of_a_time_hybrid_bends_at_the_switch() -> None:
    arm = ArmConfig("time_hybrid", 4, 2, switch_at=0.5)
    curve = [training_compute(SHAPE, arm, step, 10, 1, 0.0)["causal_exact"] for step in range(11)]
    increments = [round((b - a) * PFLOPS_DAY) for a, b in pairwise(curve)]
    assert len(set(increments[:5])) == len(set(increments[5:])) == 1
    assert increments[5] - increments[4] == attention_flops(SHAPE, None) - attention_flops(SHAPE, MobaConfig(4, 2))
