"""The recipes that come with the project: what they say, and that the demo fits its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from openmoba.lab.arms import ArmConfig
from openmoba.lab.model.build import SIZES
from openmoba.lab.study.recipe import PlannedRun, read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def configs(name: str) -> dict[str, PlannedRun]:
    recipe = read_recipe(next(path for path in RECIPES if path.stem == name))
    return {run.name: run for run in recipe.runs}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_truly_sparse(path: Path) -> None:
    recipe = read_recipe(path)
    assert {stage.chart for stage in recipe.stages} & {"scaling", "layers", "compare", "positions"}
    for run in recipe.runs:
        config = run.config(Path("study"))
        assert config.arm.top_k < config.data.length // config.arm.block_size / 2, run.name
        assert config.data.length % config.arm.block_size == 0
        attention, layers = config.arm.attention(0, config.train.steps), SIZES[config.model.size].layers
        if config.arm.name == "hybrid":
            assert 0 < len(attention.full_layer_indices(layers)) < layers


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_arms_of_a_stage_and_size_differ_in_attention_alone(path: Path) -> None:
    groups: dict[tuple[str, str, int], set[str]] = {}
    for run in read_recipe(path).runs:
        config = run.config(Path("study"))
        same = replace(config, arm=ArmConfig(), train=replace(config.train, start_from=None))
        sparsity = (config.arm.block_size, config.arm.top_k) if run.stage.chart != "compare" else None
        groups.setdefault((run.stage.name, run.size, run.seed), set()).add(repr((same, sparsity)))
    assert all(len(variants) == 1 for variants in groups.values())


def test_demo_needs_no_download_and_few_tokens() -> None:
    runs = [run.config(Path("study")) for run in configs("demo").values()]
    assert {run.data.source for run in runs} == {"stdlib"}
    assert {run.data.tokenizer for run in runs} == {"bpe"}
    assert sum(run.tokens for run in runs) <= 6_500_000, "measured: two cores train some 11,000 tokens/s of these"


def test_demo_draws_both_charts() -> None:
    runs = configs("demo")
    scaling = [run for run in runs.values() if run.stage.chart == "scaling"]
    assert {(run.size, run.arm) for run in scaling} == {
        (size, arm) for size in ("nano", "micro", "tiny") for arm in ("full", "moba")
    }
    layers = {run.arm: run.after for run in runs.values() if run.stage.chart == "layers"}
    assert layers == {
        "full": "pretrain/tiny-full-seed0",
        **dict.fromkeys(("moba", "last-1", "last-2", "last-3"), "pretrain/tiny-moba-seed0"),
    }
