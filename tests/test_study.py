"""Studies: recipes and their errors, killed and finished, shared by processes, and dependencies between runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic_study import RECIPE, silent, train
from tiny import curve

from openmoba import cli
from openmoba.lab.config import RunConfig, to_dict
from openmoba.lab.errors import DivergenceError, Terminated
from openmoba.lab.study import report
from openmoba.lab.study.overview import overview
from openmoba.lab.study.recipe import parse_recipe, read_recipe
from openmoba.lab.study.work import run_study
from openmoba.records import disk
from openmoba.records.locks import claim, holder

SMALL = """
title = "A study in seconds"
[run]
data = {{ source = "{root}/texts", hold_out = 4, tokenizer = "bytes", length = 64, cache = "{root}/cache" }}
arm = {{ block_size = 8, top_k = 2 }}
model = {{ size = "nano" }}
train = {{ steps = {steps}, batch_size = 2, log_every = 2, checkpoint_every = 4 }}
eval = {{ windows = 4, every = 8, trailing = 16, position_range = 16 }}
[sizes.nano]
[arms]
moba = {{ name = "moba" }}
last-1 = {{ name = "hybrid", full_layers = 1 }}
[[stages]]
name = "pretrain"
sizes = ["nano"]
arms = ["moba"]
[[stages]]
name = "finetune"
sizes = ["nano"]
arms = ["moba", "last-1"]
after = "pretrain"
branch = "moba"
chart = "layers"
run = {{ train = {{ steps = 8, loss_tokens = 16 }} }}
"""
RUNS = ["pretrain/nano-moba-seed0", "finetune/nano-moba-seed0", "finetune/nano-last-1-seed0"]


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "openmoba", "study", str(recipe), "--out", str(out)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of three real runs, one after another."""
    root = tmp_path_factory.mktemp("recipe")
    (root / "texts").mkdir()
    for n in range(8):
        (root / "texts" / f"{n}.txt").write_text("".join(f"{i} times {n} is {i * n}, " for i in range(40)))
    (root / "small.toml").write_text(SMALL.format(root=root, steps=48))
    return root / "small.toml"


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That study, finished in one go."""
    out = tmp_path_factory.mktemp("studies") / "uninterrupted"
    output = finish(start(recipe, out))
    assert "report.md" in output, "the user is told where to look"
    assert "layerwise-hybrid.png" in output
    return out


def test_killed_study_is_finished_by_a_second_call_with_the_same_curves(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    process = start(recipe, out)
    metrics = out / RUNS[0] / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not any(row["step"] >= 10 for row in disk.read(metrics)):
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline, "the study makes no progress"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / RUNS[0] / "result.json").exists(), "killed too late to test anything"
    output = finish(start(recipe, out))
    assert "goes on from step" in output
    for run in RUNS:
        assert curve(out / run) == curve(uninterrupted / run), run
    assert f"finished  {RUNS[0]}" in overview(read_recipe(recipe), out)


def test_two_processes_share_a_study_without_doing_a_run_twice(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    outputs = [finish(process) for process in [start(recipe, out), start(recipe, out)]]
    for run in RUNS:
        assert "".join(outputs).count(f": {run}") == 1, outputs
        assert curve(out / run) == curve(uninterrupted / run), run
    assert (out / "report.md").exists()


def test_branches_start_from_the_run_they_name(uninterrupted: Path) -> None:
    for run in RUNS[1:]:
        config = disk.read_json(uninterrupted / run / "config.json")
        assert config["train"]["start_from"].endswith(RUNS[0])
        first = disk.read(uninterrupted / run / "metrics.jsonl")[0]
        scratch = disk.read(uninterrupted / RUNS[0] / "metrics.jsonl")[0]
        assert first["loss"] < scratch["loss"] - 0.5, "a branch keeps what its origin learned"


def test_finished_study_trains_nothing_and_survives_a_move(recipe: Path, uninterrupted: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(uninterrupted)
    assert run_study(read_recipe(recipe), moved, forbidden, silent) == 0


def test_run_of_another_configuration_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, title="t")
    train(recipe.runs[5].config(tmp_path), tmp_path / recipe.runs[5].name)
    changed = parse_recipe(RECIPE.replace("steps = 200", "steps = 300"), title="t")
    with pytest.raises(ValueError, match=r"train\.steps was 200 and is 300.*choose another --out") as error:
        run_study(changed, tmp_path, forbidden, silent)
    assert recipe.runs[5].name in str(error.value)
    assert run_study(recipe, tmp_path, train, silent) == len(recipe.runs) - 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('arms = ["full", "moba"]', 'arms = ["full", "mamba"]', r"stage 'pretrain': arms: unknown 'mamba'.*last-3"),
        ('full = { name = "full" }', 'full = { name = "fast" }', r"arm\.name must be 'full' or 'moba'.*got 'fast'"),
        ("top_k = 3", "topk = 3", r"unknown key 'arm\.topk'; the keys of arm are"),
        ("top_k = 3", "top_k = 0", r"top_k"),
        ("[sizes]", "[widths]", r"the recipe: unknown 'widths'; allowed are"),
        ('sizes = ["large"]', 'sizes = ["huge"]', r"sizes: unknown 'huge'; allowed are small, medium, large"),
        ('after = "pretrain"', 'after = "warmup"', r"after: unknown 'warmup'; allowed are pretrain"),
        ('branch = "moba"', "", r"last-1, last-2, last-3 are not in stage 'pretrain'; set branch"),
        ("seeds = [0, 1]\nchart = \"layers\"", "seeds = [0, 7]\nchart = \"layers\"", r"lacks the seeds \[7\]"),
        ("seeds = [0, 1]\nchart = \"layers\"", "seeds = []\nchart = \"layers\"", r"without repetitions, got \[\]"),
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


def test_a_recipe_of_another_study_is_refused_before_it_takes_the_folder(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, title="t")
    part = recipe.chosen(["pretrain/*-full-seed0", "finetune/large-last-1-seed0"])
    run_study(recipe, tmp_path, train, silent, part)
    (tmp_path / "needle" / "model").mkdir(parents=True)
    (tmp_path / "needle" / "model" / "config.json").write_text("{}")  # no run
    other = parse_recipe(RECIPE.replace('"pretrain"', '"second"'), title="t")
    message = (
        r"does not name \(pretrain/large-full-seed0, pretrain/large-moba-seed0, pretrain/medium-full-seed0 and 1 more"
    )
    with pytest.raises(ValueError, match=message):
        run_study(other, tmp_path, forbidden, silent)
    assert (tmp_path / "recipe.toml").read_text() == RECIPE
    run_study(recipe, tmp_path, train, silent)


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


def test_special_settings_win_over_general_ones(tmp_path: Path) -> None:
    runs = {run.name: run.config(tmp_path) for run in parse_recipe(RECIPE, title="t", source="novels.parquet").runs}
    run = runs["finetune/large-last-2-seed1"]
    assert (run.train.steps, run.train.seed, run.train.loss_tokens) == (40, 1, 128)
    assert (run.arm.name, run.arm.full_layers, run.arm.block_size) == ("hybrid", 2, 64)
    assert run.data.source == "novels.parquet"
    assert run.train.start_from == str(tmp_path / "pretrain/large-moba-seed1")
    assert runs["finetune/large-full-seed0"].train.start_from == str(tmp_path / "pretrain/large-full-seed0")


def test_runs_wait_for_what_they_start_from(tmp_path: Path) -> None:
    order = []

    def note(config: Any, folder: Path, **_: Any) -> dict[str, Any]:
        if config.train.start_from:
            assert (Path(config.train.start_from) / "result.json").exists()
        order.append(folder)
        return train(config, folder)

    recipe = parse_recipe(RECIPE, title="t")
    assert run_study(recipe, tmp_path, note, silent) == len(recipe.runs) == len(set(order))


def test_a_failed_run_stops_the_study_and_releases_its_claim(tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> dict[str, Any]:
        raise ValueError("the loss was not a finite number")

    recipe = parse_recipe(RECIPE, title="t")
    with pytest.raises(ValueError, match="not a finite number"):
        run_study(recipe, tmp_path, fail, silent)
    with claim(tmp_path / recipe.runs[0].name) as mine:
        assert mine


def test_a_run_that_diverges_is_marked_and_the_study_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def diverge(config: RunConfig, folder: Path, **_: Any) -> dict[str, Any]:
        tried.append(folder.name)
        if config.train.learning_rate > 1:
            disk.append(folder / "metrics.jsonl", {"kind": "train", "step": 1})
            error = DivergenceError("the gradient was not a finite number at step 2; lower train.learning_rate=1e+30")
            disk.write_json(folder / "failed.json", {"reason": str(error), "config": to_dict(config)})
            raise error
        return train(config, folder)

    monkeypatch.setattr("openmoba.lab.train.run.run_training", diverge)
    text = RECIPE.replace("train = { steps = 400 }", "train = { steps = 400, learning_rate = 1e30 }")
    path, out = tmp_path / "r.toml", tmp_path / "out"
    path.write_text(text)
    for _ in range(2):  # what failed is not tried again
        assert cli.main(["study", str(path), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert "4 of 22 runs failed. 10 that start from them were not trained." in error
        assert "pretrain/large-full-seed0: the gradient was not a finite number at step 2; lower" in error
        assert (out / "report.md").exists()
        assert len(tried) == 12
    assert "failed    pretrain/large-full-seed0" in overview(read_recipe(path), out)
    path.write_text(RECIPE)
    assert cli.main(["study", str(path), "--out", str(out)]) == 0
    assert len(tried) == 12 + 14
    assert not list(out.rglob("failed.json"))


def test_sigterm_ends_a_study_with_the_run(tmp_path: Path) -> None:
    tried: list[Path] = []

    def stop(config: RunConfig, folder: Path, **_: Any) -> dict[str, Any]:
        tried.append(folder)
        raise Terminated(f"{folder} stopped at step 3")

    recipe = parse_recipe(RECIPE, title="t")
    with pytest.raises(Terminated, match="stopped at step 3"):
        run_study(recipe, tmp_path, stop, silent)
    assert len(tried) == 1
    assert not list(tmp_path.rglob("failed.json"))
    with claim(tried[0]) as mine:
        assert mine


def test_leftovers_in_a_study_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".report.md.999999999"
    left.write_text("#")
    run_study(parse_recipe(RECIPE, title="t"), tmp_path, train, silent)
    assert not left.exists()


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="once per GPU"):
        run_study(parse_recipe(RECIPE, title="t"), tmp_path, forbidden, silent)


def test_chosen_runs_are_trained_alone_with_those_that_they_start_from(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, title="t")
    part = recipe.chosen(["finetune/*-last-1-seed0", "pretrain/small-full-*"])
    names = ["pretrain/small-full-seed0", "pretrain/small-full-seed1", "pretrain/large-moba-seed0"]
    assert [run.name for run in part.runs] == [*names, "finetune/large-last-1-seed0"]
    assert run_study(recipe, tmp_path, train, silent, part) == 4
    assert sum((tmp_path / run.name / "result.json").exists() for run in recipe.runs) == 4
    assert run_study(recipe, tmp_path, train, silent) == len(recipe.runs) - 4
    with pytest.raises(ValueError, match=r"no run matches 'pretrain/tiny\*'; the runs are pretrain/small-full-seed0, "):
        recipe.chosen(["pretrain/*", "pretrain/tiny*"])
    with pytest.raises(
        ValueError, match=r"no pattern to choose runs by; leave --runs out for all, or choose of pretrain/"
    ):
        recipe.chosen([])


def test_the_chosen_runs_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    command = ["study", str(path), "--out", str(tmp_path / "study"), "--runs", "pretrain/small-*", "*/medium-*-seed1"]
    assert cli.main([*command, "--dry-run", "--tflops", "700"]) == 0
    assert "6 runs, 6 to be finished in about" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--tflops", "700"])
    assert "--tflops 700 is for plans; add --dry-run" in capsys.readouterr().err


def test_a_run_whose_origin_lost_its_weights_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, title="t")
    run_study(recipe, tmp_path, train, silent, recipe.chosen(["pretrain/large-moba-seed0"]))
    origin = tmp_path / "pretrain/large-moba-seed0"
    (origin / "checkpoint-400").rmdir()
    message = (
        rf"finetune/large-last-\d-seed0 starts from {origin}, which is finished but has no checkpoint here; bring it"
    )
    with pytest.raises(ValueError, match=message):
        run_study(recipe, tmp_path, forbidden, silent)
    assert run_study(recipe, tmp_path, train, silent, recipe.chosen(["pretrain/*"])) == 11


def test_who_ends_last_writes_the_report_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process writes: it knows all runs, or one was finished after it began to read."""
    recipe = parse_recipe(RECIPE, title="t")
    part = recipe.chosen(["pretrain/*-full-seed0"])
    run_study(recipe, tmp_path, train, silent, part)
    monkeypatch.setattr(report, "draw_charts", lambda *_: [])
    results = [tmp_path / run.name / "result.json" for run in part.runs]
    with claim(tmp_path):
        now = (tmp_path / "claim.lock").stat().st_mtime
        for file in results:
            os.utime(file, (now - 1, now - 1))
        assert report.write_report(recipe, tmp_path, "6nd") == [tmp_path / "report.md"]
        assert not (tmp_path / "report.md").exists()
        os.utime(results[-1], (now + 1, now + 1))
        other = threading.Thread(target=report.write_report, args=(recipe, tmp_path, "6nd"))
        other.start()
        other.join(0.1)
        assert other.is_alive()
    other.join(10)
    assert "3 of 22 runs are finished" in (tmp_path / "report.md").read_text()


def test_claim_of_a_dead_process_is_free(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from openmoba.records.locks import claim\n"
    code += "with claim(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"True\n"
    with claim(tmp_path) as mine:
        assert not mine
    assert f"process {process.pid} on" in holder(tmp_path)
    process.kill()
    process.communicate()
    with claim(tmp_path) as mine:
        assert mine


def forbidden(*_: Any, **__: Any) -> dict[str, Any]:
    raise AssertionError("nothing should be trained")


def test_config_of_a_run_is_as_trained(uninterrupted: Path) -> None:
    for run in RUNS:
        result = json.loads((uninterrupted / run / "result.json").read_text())
        assert result["config"] == disk.read_json(uninterrupted / run / "config.json")
