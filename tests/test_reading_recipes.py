"""Reading recipes: what they may say, which setting wins, and one error that names the value."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_study import RECIPE

from openmoba import cli
from openmoba.lab.study.recipe import parse_recipe, read_recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('arms = ["full", "moba"]', 'arms = ["full", "mamba"]', r"stage 'pretrain': arms: unknown 'mamba'.*last-3"),
        ('full = { name = "full" }', 'full = { name = "fast" }', r"arm\.name must be 'full' or 'moba'.*got 'fast'"),
        ("top_k = 3", "topk = 3", r"unknown key 'arm\.topk'; the keys of arm are"),
        ("top_k = 3", "top_k = 0", r"top_k"),
        ("[sizes]", "[widths]", r"the recipe: unknown 'widths'; allowed are"),
        ('sizes = ["large"]', 'sizes = ["huge"]', r"sizes: unknown 'huge'; allowed are small, medium, large"),
        ('sizes = ["large"]', 'sizes = "large"', r"stages\.sizes must be a list, got 'large'"),
        ('chart = "scaling"', 'beside = "pretrain"', r"beside: unknown 'pretrain'; allowed are none"),
        ('after = "pretrain"', 'after = "warmup"', r"after: unknown 'warmup'; allowed are pretrain"),
        ('branch = "moba"', "", r"last-1, last-2, last-3 are not in stage 'pretrain'; set branch"),
        ("seeds = [0, 1]\nchart = \"layers\"", "seeds = [0, 7]\nchart = \"layers\"", r"lacks the seeds \[7\]"),
        ("seeds = [0, 1]\nchart = \"layers\"", "seeds = []\nchart = \"layers\"", r"list of at least one, .*got \[\]"),
        ('chart = "scaling"', "more_seeds = { tiny = [2] }", r"more_seeds: unknown 'tiny'; allowed are small, medium"),
        ('chart = "scaling"', "more_seeds = { large = [2], moba = [2] }", r"give moba of size large a seed twice"),
        ('chart = "layers"', "more_seeds = { last-1 = [2] }", r"last-1 .* from moba of stage .*lacks the seeds \[2\]"),
        ('after = "pretrain"', 'beside = "warmup"', r"beside: unknown 'warmup'; allowed are pretrain"),
        (
            'after = "pretrain"',
            'beside = "pretrain"\nbeside_arms = ["last-9"]',
            r"beside_arms: unknown 'last-9'; allowed are full, moba",
        ),
        ('after = "pretrain"', 'beside = "pretrain"', r"cannot be compared .* differ in train\.loss_tokens"),
        (
            "run = { train = { steps = 40, loss_tokens = 128 } }",
            'beside = "pretrain"',
            r"cannot be compared .* differ in what they go on from",
        ),
        ('name = "finetune"', 'name = "pretrain"', r"two stages are called 'pretrain'"),
        ('chart = "scaling"', 'chart = "pie"', r"stages\.chart must be 'scaling' or 'layers' or 'compare' or"),
        ('size = "small"', 'size = "smol"', r"unknown model\.size 'smol'"),
        ('title = "Synthetic study"', "title =", r"Invalid value"),
        ('title = "Synthetic study"', "title = 3", r"title must be"),
        ('title = "Synthetic study"', "question = 3", r"question must be a text, got 3"),
        ('full = { name = "full" }', "full = {}", r"arms\.full does not say its kind"),
        ('full = { name = "full" }', 'full = "full"', r"arms\.full must be a table of options, got 'full'"),
        ("full_layers = 3", "full_layers = 20", r"large-last-3-seed0: full_layers=20 exceeds .* 16 layers"),
        ("length = 1024", "length = 100", r"loss_tokens=128 is more than a window of data\.length=100"),
        ('name = "finetune"', "", r"a stage must be a table with a name"),
        ("run = { train = { steps = 40, loss_tokens = 128 } }", "run = 3", r"and its run a table"),
        ('name = "pretrain"', 'name = "../pretrain"', r"stage '\.\./pretrain' is a part of a folder's name.*rename it"),
        ('name = "pretrain"', 'name = "/tmp/pretrain"', r"stage '/tmp/pretrain' is a part of"),
        ("small = { model", '"../small" = { model', r"sizes\.\.\./small is a part of a folder's name"),
        ('full = { name = "full" }', '"/full" = { name = "full" }', r"arms\./full is a part of"),
        ('full = { name = "full" }', '".." = { name = "full" }', r"arms\.\.\. is a part of"),
        ("run = { train = { steps = 40, loss_tokens = 128 } }", "run = { train = 3 }", r"train must be a table .* 3"),
    ],
)  # fmt: skip
def test_bad_recipe_is_one_error_that_names_the_value(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    path = tmp_path / "bad.toml"
    path.write_text(RECIPE.replace(old, new, 1) if old != "[sizes]" else RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


def test_missing_recipe_and_bad_recipe_end_the_command_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", str(tmp_path / "none.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no recipe" in capsys.readouterr().err
    assert cli.main(["study", str(tmp_path)]) == 2
    assert f"{tmp_path} is not readable as a recipe (Is a directory)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_runs_and_trains_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    assert cli.main(["study", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 22 + 1
    assert lines[-2].startswith("missing   finetune/large-last-3-seed1, from pretrain/large-moba-seed1 ")
    assert not (tmp_path / "out").exists()


def test_some_arms_and_sizes_have_more_seeds() -> None:
    more = "more_seeds = { moba = [2], small = [7] }"
    runs = parse_recipe(RECIPE.replace('chart = "scaling"', more), title="t").runs
    seeds = {
        (size, arm): [run.seed for run in runs if (run.stage.name, run.size, run.arm) == ("pretrain", size, arm)]
        for size in ("small", "large")
        for arm in ("full", "moba")
    }
    assert seeds == {
        ("small", "full"): [0, 1, 7],
        ("small", "moba"): [0, 1, 7, 2],
        ("large", "full"): [0, 1],
        ("large", "moba"): [0, 1, 2],
    }


def test_layers_of_a_model_from_outside_the_study_are_not_known() -> None:
    outside = RECIPE.replace("full_layers = 3", "full_layers = 20")
    assert parse_recipe(outside.replace("[sizes]", '[run.train]\nstart_from = "hub/model"\n[sizes]'), title="t").runs
    assert parse_recipe(outside.replace("[sizes]", "[run.model.overrides]\nnum_hidden_layers = 20\n[sizes]"), title="t")


def test_chosen_runs_bring_all_that_they_go_on_from() -> None:
    again = '[[stages]]\nname = "again"\nsizes = ["large"]\narms = ["last-1"]\nafter = "finetune"\n'
    chosen = parse_recipe(RECIPE + again, title="t").chosen(["again/*"])
    names = ["pretrain/large-moba-seed0", "finetune/large-last-1-seed0", "again/large-last-1-seed0"]
    assert [run.name for run in chosen.runs] == names


@pytest.mark.parametrize(
    ("other", "arms", "sweep"),
    [
        ("learning_rate = 1e-3", ["full"], True),
        ("learning_rate = 1e-3", ["full", "moba"], False),
        ("", ["full"], False),
    ],
)
def test_a_sweep_is_of_one_arm_at_several_rates(other: str, arms: list[str], sweep: bool) -> None:
    text = f"""
        sizes = {{ a = {{ }}, b = {{ train = {{ {other} }} }} }}
        arms = {{ full = {{ name = "full" }}, moba = {{ name = "moba" }} }}
        stages = [{{ name = "rates", sizes = ["a", "b"], arms = {arms} }}]
    """
    assert {run.sweep for run in parse_recipe(text, title="t").runs} == {sweep}


def test_special_settings_win_over_general_ones(tmp_path: Path) -> None:
    stage = "loss_tokens = 128 }, arm = { block_size = 32, full_layers = 9 } }"
    text = RECIPE.replace("loss_tokens = 128 } }", stage)
    runs = {run.name: run.config(tmp_path) for run in parse_recipe(text, title="t", source="novels.parquet").runs}
    run = runs["finetune/large-last-2-seed1"]
    assert (run.train.steps, run.train.seed, run.train.loss_tokens) == (40, 1, 128)
    assert (run.arm.name, run.arm.full_layers, run.arm.block_size) == ("hybrid", 2, 32)
    assert run.data.source == "novels.parquet"
    assert run.train.start_from == str(tmp_path / "pretrain/large-moba-seed1")
    assert runs["finetune/large-full-seed0"].train.start_from == str(tmp_path / "pretrain/large-full-seed0")
