"""Studies: killed and finished, shared by processes, and dependencies between runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import TIMEOUT
from synthetic_study import RECIPE, silent, train
from tiny import curve, one_thread, openmoba_until

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


OPENMOBA = (sys.executable, "-m", "openmoba")


def start(recipe: Path, out: Path, openmoba: Sequence[str] = OPENMOBA) -> subprocess.Popen[bytes]:
    command = [*openmoba, "study", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> str:
    output = process.communicate(timeout=TIMEOUT)[0].decode()
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
    process = start(recipe, out, openmoba_until(40))
    metrics = out / RUNS[0] / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
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
        diverged = ", ".join(
            f"pretrain/large-{run}" for run in ("full-seed0", "full-seed1", "moba-seed0", "moba-seed1")
        )
        assert f"**Diverged**, and so without a loss here: {diverged}." in (out / "report.md").read_text()
        assert len(tried) == 12
    assert "failed    pretrain/large-full-seed0" in overview(read_recipe(path), out)
    path.write_text(RECIPE)
    assert cli.main(["study", str(path), "--out", str(out)]) == 0
    assert len(tried) == 12 + 14
    assert not list(out.rglob("failed.json"))
    assert "Diverged" not in (out / "report.md").read_text()


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


def test_runs_that_processes_cannot_share_are_refused_before_any_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"run \S+: train.batch_size=\d+ does not .* train.context_parallel=3"):
        run_study(parse_recipe(RECIPE, title="t"), tmp_path / "study", forbidden, silent)
    assert not (tmp_path / "study").exists()


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
    other.join(TIMEOUT)
    assert "3 of 22 runs so far" in (tmp_path / "report.md").read_text()


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
