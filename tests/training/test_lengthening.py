"""Runs that are made longer: only where no step that is done would change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import EvalConfig, RunConfig, TrainConfig
from openmoba.lab.train.run import run_training
from openmoba.lab.train.schedule import check_lengthening
from openmoba.records import disk

CONSTANT = {"schedule": "wsd", "decay": 0.0, "warmup": 0.0}


def test_a_run_is_lengthened_into_the_run_that_it_would_have_been(root: Path, tmp_path: Path) -> None:
    long = tiny_config(root, **CONSTANT, steps=6)
    run_training(long, tmp_path / "long")
    run_training(tiny_config(root, **CONSTANT), tmp_path / "run")
    assert cli.main(["train", str(tmp_path / "run"), "--train.steps", "6"]) == 0
    once, twice = (disk.read(tmp_path / name / "metrics.jsonl") for name in ("long", "run"))
    assert [row["loss"] for row in once if "loss" in row] == [row["loss"] for row in twice if "loss" in row]
    assert once[-1]["windows"] == twice[-1]["windows"]
    assert disk.read_json(tmp_path / "run" / "config.json")["train"]["steps"] == 6
    assert disk.read_json(tmp_path / "run" / "result.json")["eval"]["step"] == 6


@pytest.mark.parametrize(
    ("before", "after", "done", "message"),
    [
        ({}, {"steps": 300}, 100, r"steps was 200 and is 300, so the learning rate of step 1 would have been"),
        ({"schedule": "wsd"}, {"steps": 400, "schedule": "wsd"}, 100, r"with train\.warmup=0\.025 for as many steps"),
        ({"schedule": "wsd"}, {"steps": 400, "schedule": "wsd", "warmup": 0.025}, 100, None),
        ({"schedule": "wsd"}, {"steps": 400, "schedule": "wsd", "warmup": 0.025}, 161, r"rate of step 162 would have"),
        ({}, {"steps": 300}, 0, None),
        (CONSTANT, {**CONSTANT, "steps": 100}, 100, r"^train\.steps was 200 and is 100$"),
        (CONSTANT, {**CONSTANT, "steps": 400, "beta1": 0.8}, 100, r"^train\.beta1 was 0\.9 and is 0\.8$"),
        (CONSTANT, {**CONSTANT, "steps": 400}, 200, None),
    ],
)
def test_longer_only_where_no_step_would_change(
    before: dict[str, Any], after: dict[str, Any], done: int, message: str | None
) -> None:
    stored, wanted = (RunConfig(train=TrainConfig(**settings)) for settings in (before, after))
    if message is None:
        check_lengthening(stored, wanted, done)
        return
    with pytest.raises(ValueError, match=message):
        check_lengthening(stored, wanted, done)


def test_longer_runs_switch_and_are_evaluated_at_the_same_steps() -> None:
    stored, wanted = (RunConfig(train=TrainConfig(**CONSTANT, steps=steps)) for steps in (200, 400))
    timed = ArmConfig("time_hybrid", switch_at=0.5)
    with pytest.raises(ValueError, match=r"give the shares that say the same, arm\.switch_at=0\.25 arm\.warm_start=0"):
        check_lengthening(replace(stored, arm=timed), replace(wanted, arm=timed), 150)
    check_lengthening(replace(stored, arm=timed), replace(wanted, arm=replace(timed, switch_at=0.25)), 150)
    check_lengthening(replace(stored, arm=timed), replace(wanted, arm=timed), 50)
    warm = ArmConfig("moba", warm_start=0.5)
    with pytest.raises(ValueError, match=r"arm\.warm_start=0\.25"):
        check_lengthening(replace(stored, arm=warm), replace(wanted, arm=warm), 150)
    check_lengthening(replace(stored, arm=warm), replace(wanted, arm=replace(warm, warm_start=0.25)), 150)
    with pytest.raises(ValueError, match=r"so step 20, which is done, would have been evaluated"):
        check_lengthening(stored, replace(wanted, eval=EvalConfig(every=20)), 20)
    with pytest.raises(ValueError, match=r"step 2, which is done, would have been evaluated"):
        check_lengthening(replace(stored, eval=EvalConfig(count=3)), replace(wanted, eval=EvalConfig(count=10)), 150)
