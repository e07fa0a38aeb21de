"""The recipes that come with the project: what they say, the regime of the study, and that the demo fits its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from openmoba.config import MobaConfig
from openmoba.lab.arms import ArmConfig
from openmoba.lab.measure.evaluate import summary
from openmoba.lab.model.build import SIZES, build_model, set_attention
from openmoba.lab.run_files import METRICS_FILE
from openmoba.lab.study.recipe import PlannedRun, read_recipe
from openmoba.lab.train.history import record
from openmoba.lab.train.plan import planned_shape

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
RESULTS = Path(__file__).parents[1] / "results" / "h200" / "study"
STUDY = [path for path in RECIPES if path.stem != "demo"]


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
    """Over the number of full layers in their number alone; elsewhere blocks may differ, too."""
    groups: dict[tuple[str, str, int], set[str]] = {}
    for run in read_recipe(path).runs:
        config = run.config(Path("study"))
        same = replace(config, arm=ArmConfig(), train=replace(config.train, start_from=None))
        sparsity = (config.arm.block_size, config.arm.top_k) if run.stage.chart == "layers" else None
        groups.setdefault((run.stage.name, run.size, run.seed), set()).add(repr((same, sparsity)))
    assert all(len(variants) == 1 for variants in groups.values())


@pytest.mark.parametrize("path", STUDY, ids=lambda path: path.stem)
def test_the_study_keeps_to_one_regime(path: Path) -> None:
    """32K windows one by one, QK norm, a rotary base of 1e6, 4 epochs at most, and the stated learning rate."""
    windows = 952 if "novels" in path.stem else 3755  # results/corpus
    for run in read_recipe(path).runs:
        config, stage = run.alone(), run.stage.name
        train, rate = config.train, 0.96 / SIZES[config.model.size].hidden
        assert (config.data.length, config.data.vocab_size, train.batch_size) == (32768, 4096, 1)
        assert config.model.overrides["rope_parameters.rope_theta"] == 1e6
        assert config.model.family == "qwen3" or stage == "rotation"
        assert 2e6 < planned_shape(config).non_embedding < 33e6
        assert train.steps <= 4 * windows
        if stage == "finetune":
            assert (train.steps, train.learning_rate) == (0.05 * 4300, pytest.approx(rate / 10))
        elif stage != "short":
            assert train.steps >= 3000, "models of this regime look back after 1,200 to 2,300"
            assert train.learning_rate == rate or stage in ("sweep", "context"), run.name


def test_half_of_a_head_is_all_that_the_model_of_the_rotation_stage_lacks() -> None:
    """With whole heads rotated it is the other stages' model, to the bit."""
    turned, plain = (
        next(run.alone().model for run in configs("candidates").values() if run.size == size)
        for size in ("14m-half", "14m")
    )
    share = "rope_parameters.partial_rotary_factor"
    half, whole, other = (
        build_model(replace(model, size="nano"), 300, 64, 0)
        for model in (turned, replace(turned, overrides=turned.overrides | {share: 1.0}), plain)
    )
    assert turned.overrides[share] == 0.5
    for model in (half, whole):
        model.load_state_dict(other.state_dict())
    ids = torch.arange(64)[None]
    for attention in (None, MobaConfig(8, 2)):
        for model in (half, whole, other):
            set_attention(model, attention)
        assert torch.equal(whole(ids).logits, other(ids).logits)
        assert not torch.allclose(half(ids).logits, other(ids).logits)


def test_the_ladder_and_the_layers_have_their_arms() -> None:
    ladder = {(run.size, run.arm) for run in configs("chart-b").values() if run.stage.chart == "scaling"}
    arms = ("full", "moba", "last-2-keys", "full-keys")
    assert ladder == {(size, arm) for size in ("2m", "5m", "9m", "17m", "32m") for arm in arms}
    runs = [run for run in configs("chart-a").values() if run.seed == 0]
    for names in (("pretrain", "hybrids"), ("finetune",)):
        found = [run.alone().arm for run in runs if run.stage.name in names]
        layers = [len(arm.attention(0, 1).full_layer_indices(12)) if arm.name != "full" else 12 for arm in found]
        assert sorted(layers) == [0, 1, 3, 5, 10, 12]
    origins = {run.arm: run.after for run in runs if run.stage.name == "finetune"}
    assert origins == {arm: f"pretrain/15m-{'full' if arm == 'full' else 'moba'}-seed0" for arm in origins}


def test_candidates_read_as_many_keys_or_are_as_sparse_as_the_reports_setting() -> None:
    runs = configs("candidates").values()
    for run in runs:
        arm = run.alone().arm
        if run.stage.name == "granularity":
            assert run.arm == f"{arm.top_k}-{32768 // arm.block_size}"
            assert arm.top_k * arm.block_size == 3 * 512
        elif arm.name != "full":
            assert (arm.top_k - 1) * arm.block_size == 2 * 512, run.name
    for arm in ("full", "moba", "full-keys", "last-2-keys"):
        assert {run.seed for run in runs if run.arm == arm and run.size == "14m"} == {0, 1, 2}


def test_demo_needs_no_download_and_few_tokens() -> None:
    runs = [run.config(Path("study")) for run in configs("demo").values()]
    assert {run.data.source for run in runs} == {"stdlib"}
    assert {run.data.tokenizer for run in runs} == {"bpe"}
    assert sum(run.tokens for run in runs) <= 7_900_000, "two cores train some 11,000 tokens/s: 12 minutes"


def test_demo_draws_both_charts() -> None:
    runs = configs("demo")
    scaling = [run for run in runs.values() if run.stage.chart == "scaling"]
    assert {(run.size, run.arm) for run in scaling} == {
        (size, arm) for size in ("nano", "micro", "tiny") for arm in ("full", "moba")
    }
    (hybrids,) = {run.stage.name: run.stage for run in runs.values() if run.stage.chart == "layers"}.values()
    assert (hybrids.sizes, hybrids.arms, hybrids.beside) == (("tiny",), ("last-1", "last-2"), "pretrain")


OTHER_FILES = 4_400
"""Bytes of config.json, data.json and result.json of a run; those that are committed are held against it."""


def test_the_records_of_the_whole_study_stay_below_five_megabytes(tmp_path: Path) -> None:
    """Every run of its recipes with all that it will measure, from records of their shapes; needles come on top."""
    shapes = Counter(
        (
            config.eval.windows,
            config.eval.contexts,
            config.train.steps // config.train.log_every,
            config.evaluation_steps,
        )
        for path in STUDY
        for config in (run.alone() for run in read_recipe(path).runs)
    )
    sizes = {shape: written(tmp_path / str(number), *shape) for number, shape in enumerate(shapes)}
    (shape,) = (shape for shape in shapes if shape[0] == 240 and shape[2] == 86)
    committed = RESULTS / "candidates" / "candidates" / "14m-full-seed0" / "metrics.jsonl"
    assert sizes[shape] == pytest.approx(committed.stat().st_size, rel=0.05), "they are as large as real ones"
    for folder in {path.parent for path in RESULTS.glob("*/*/*/result.json")}:
        assert sum((folder / name).stat().st_size for name in ("config.json", "data.json", "result.json")) < OTHER_FILES
    assert sum(shapes.values()) == 117
    assert sum(count * (sizes[shape] + OTHER_FILES) for shape, count in shapes.items()) < 4.5e6


def written(folder: Path, windows: int, contexts: tuple[int, ...], lines: int, evaluated: tuple[int, ...]) -> int:
    """Write the records of a run of 32K windows with losses that look like measured ones; return their bytes."""
    folder.mkdir()
    rng = np.random.default_rng(windows)
    compute = {"6nd": 1.3858e-4, "chinchilla": 2.16241e-3, "causal_exact": 1.13898e-3, "accelerator_seconds": 297.021}
    for step in range(lines):
        loss, rate, gradient, seconds = rng.uniform(1, 9, 4).tolist()
        row = {"kind": "train", "step": 50 * step, "tokens": 1638400 * step, "loss": loss, "lr": rate / 1e3}
        row |= {"grad_norm": gradient, "seconds": 100 * seconds, "tokens_per_second": 475900.0, "mfu": 0.3361}
        record(folder, {**row, "compute": {"accelerator_seconds": 99 * seconds}})
    measured: Any = SimpleNamespace(full=np.ones(windows, dtype=bool), documents=np.arange(windows) * 40 // windows)
    for step in evaluated:
        loss_WT = np.abs(rng.normal(1.6, 0.4, (windows, 1)) + rng.normal(0, 0.3, (windows, 16)))
        final = step == evaluated[-1]
        row = summary(loss_WT, np.ones_like(loss_WT, dtype=bool), measured, 1, 1, each_window=final)
        for number, part in enumerate(row["position_loss"]):
            part |= {"start": 2048 * number, "end": 2048 * number + 2048}
        if final and contexts:
            row["context_loss"] = [{**part, "context": 2048} for part in row["position_loss"][: len(contexts)]]
            row["windows"]["contexts"] = [losses[: len(contexts)] for losses in row["windows"]["positions"]]
        record(folder, {"kind": "eval", "step": step, "tokens": 32768 * step, **row, "compute": compute})
    return (folder / METRICS_FILE).stat().st_size
