"""What a run leaves and says: its records, checkpoints and progress; records and results that are none."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import Heard

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import RunConfig, to_dict
from openmoba.lab.measure.evaluate import evaluate_source
from openmoba.lab.train import callback, trainer
from openmoba.lab.train.history import evaluations, history, history_until, read_result
from openmoba.lab.train.run import run_training
from openmoba.lab.train.schedule import learning_rate_factor
from openmoba.records import disk


def test_a_run_leaves_its_records(config: RunConfig, finished: Path) -> None:
    rows = history(finished)
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert train[-1]["tokens"] == 12 * 4 * 64 == config.tokens
    rates = [config.train.learning_rate * learning_rate_factor(row["step"] - 1, 12, config.train) for row in train]
    assert [row["lr"] for row in train] == pytest.approx(rates, rel=1e-5)
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert set(train[0]) >= {"kind", "step", "tokens", "loss", "lr", "seconds", "tokens_per_second", "mfu", "compute"}
    assert set(train[0]["compute"]) == {"accelerator_seconds"}, "the others follow from the step"
    assert set(evaluations[0]["compute"]) == {"6nd", "chinchilla", "causal_exact", "accelerator_seconds"}
    assert 0 < train[-1]["compute"]["accelerator_seconds"] < train[-1]["seconds"]
    assert [part["end"] for part in evaluations[0]["position_loss"]] == [16, 32, 48, 64]
    assert not {"windows", "intervals"} & set(evaluations[0])
    windows = evaluations[-1].pop("windows")
    assert {name: len(values) for name, values in windows.items()} == dict.fromkeys(windows, 4)
    assert set(windows) == {"document", "lm", "trailing", "positions"}
    assert [len(ranges) for ranges in windows["positions"]] == [4] * 4
    assert sum(windows["lm"]) / 4 == pytest.approx(evaluations[-1]["lm_loss"], rel=1e-5)
    result = disk.read_json(finished / "result.json")
    assert result["eval"] == {name: evaluations[-1][name] for name in ("step", "lm_loss", "trailing_loss")}
    assert result["config"] == to_dict(config) == disk.read_json(finished / "config.json")
    assert (result["arm"], result["size"], result["seed"]) == ("moba", "nano", 0)
    assert result["params"]["total"] > result["params"]["non_embedding"] > 0
    assert set(result) >= {"tokens", "compute", "versions", "hardware", "commit", "seconds"}


def test_records_carry_the_speed_of_their_own_steps(finished: Path) -> None:
    rows = [row for row in disk.read(finished / "metrics.jsonl") if row["kind"] == "train"]
    for before, row in pairwise([{"compute": {"accelerator_seconds": 0.0}}, *rows]):
        seconds = row["compute"]["accelerator_seconds"] - before["compute"]["accelerator_seconds"]
        assert row["tokens_per_second"] == pytest.approx(2 * 4 * 64 / seconds, rel=1e-3)
        assert row["mfu"] is None, "nobody states the peak of this CPU"
    speed = disk.read_json(finished / "result.json")["speed"]
    found = sorted(row["tokens_per_second"] for row in rows)
    assert speed == {"tokens_per_second": pytest.approx((found[2] + found[3]) / 2), "mfu": None, "peak": None}


def test_checkpoints_hold_safetensors_and_nothing_pickled_that_runs_code(finished: Path) -> None:
    (checkpoint,) = finished.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-12"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "optimizer.pt", "complete.json"} <= names
    assert "training_args.bin" not in names
    torch.load(checkpoint / "optimizer.pt", weights_only=True)


def test_what_an_evaluation_found_in_every_window_is_read_back(finished: Path) -> None:
    measured = evaluate_source(str(finished))
    *_, recorded = evaluations(finished, *read_result(finished))
    assert recorded["windows"] == measured["windows"]
    assert recorded["intervals"]["lm"] == pytest.approx(measured["intervals"]["lm"], rel=5e-6)
    assert recorded["lm_loss"] == float(f"{measured['lm_loss']:.6g}") != measured["lm_loss"]


def test_a_result_without_its_evaluation_is_not_drawn(copied: Path) -> None:
    config, result = read_result(copied)
    assert [row["step"] for row in evaluations(copied, config, result)] == [4]
    rows = disk.read(copied / "metrics.jsonl")
    disk.keep(copied / "metrics.jsonl", [row | {"lm_loss": 5.0} if row["kind"] == "eval" else row for row in rows])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: the evaluation of step 4 says lm_loss=5\.0, .*result\.json"):
        evaluations(copied, config, result)
    disk.keep(copied / "metrics.jsonl", rows[:-1])
    with pytest.raises(ValueError, match=r"metrics\.jsonl lacks the evaluation of step 4, though .*result\.json is of"):
        evaluations(copied, config, result)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 2 has no 'kind'"),
        ('{"kind": "eval", "step": 4}', "line 2 has no 'lm_loss'"),
        ('{"kind": "train", "step": "4"}', "line 2: step is not int but '4'"),
        ('{"kind": "other", "step": 4}', "line 2: unknown kind 'other'"),
        ('{"kind": "train", "step": 4, "loss": 1, "seconds": 1, "compute": []}', r"compute is not a table but \[\]"),
    ],
)
def test_records_that_are_none_are_named(short: RunConfig, copied: Path, line: str, message: str) -> None:
    first = (copied / "metrics.jsonl").read_text().splitlines()[0]
    (copied / "metrics.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        history_until(copied, short, 4)


def test_a_result_that_is_none_is_named(copied: Path) -> None:
    for content, message in (("{}", "has no 'config'"), ('{"config": {"model": 3}}', "has no 'params'")):
        (copied / "result.json").write_text(content)
        with pytest.raises(ValueError, match=rf"result\.json {message}"):
            read_result(copied)


def test_a_run_says_what_it_is_and_how_it_goes(config: RunConfig, tmp_path: Path) -> None:
    heard = Heard()
    hybrid = replace(config, arm=ArmConfig("hybrid", 8, 2, full_layers=1))
    run_training(hybrid, tmp_path / "run", progress=heard)
    summary = next(note for note in heard.notes if note.startswith(str(tmp_path)))
    for said in (
        r"model +llama nano, 1\d\d K parameters \(101 K without embeddings\)",
        r"attention +MoBA, blocks of 8, top-2, 1 of 2 layers full \(1\): 68% of full attention's keys; cpu \(",
        r"data .*texts: \d+ windows of 64 tokens, 4 held out, vocabulary 25\d",
        r"training +12 steps of 256 tokens in 4 windows: 3,072 tokens, [\d.]+ epochs",
        r"device .*, \d+ threads?, fp32",
        r"records .*run/metrics\.jsonl every 2 steps, 2 evaluations, checkpoint every 4",
    ):
        assert re.search(said, summary), (said, summary)
    evaluations = [row for row in disk.read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"]
    for row in evaluations:
        told = f"step {row['step']}: held-out loss {row['lm_loss']:.4f}, last 16 tokens {row['trailing_loss']:.4f}"
        assert told in heard.notes
    assert re.fullmatch(r"2/12 loss \d\.\d+  lr 0\.00\d+  [\d,]+ tokens/s 0\.17", heard.steps[0]), heard.steps


def test_progress_is_told_between_two_records_too(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "SECONDS_PER_LINE", 0.0)
    heard = Heard()
    run_training(replace(config, train=replace(config.train, steps=4)), tmp_path / "run", progress=heard)
    assert [step.split("/")[0] for step in heard.steps] == ["1", "2", "3", "4"]


def test_progress_says_what_the_mfu_is_a_share_of(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "peak_operations", lambda *_: 1e9)
    heard = Heard()
    run_training(replace(config, train=replace(config.train, steps=4)), tmp_path / "run", progress=heard)
    share = next(row["mfu"] for row in history(tmp_path / "run") if row["kind"] == "train")
    assert f" tokens/s  MFU {share:.0%} of data sheet " in heard.steps[0]
