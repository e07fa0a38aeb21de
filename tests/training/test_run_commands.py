"""`openmoba train`, `evaluate`, `runs` and `convert` on the folder of a run."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, interrupt

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import RunConfig, TrainConfig, to_dict
from openmoba.lab.measure.compute import Shape
from openmoba.lab.model.build import load_model
from openmoba.lab.train.plan import planned_shape
from openmoba.lab.train.run import run_training
from openmoba.lab.train.summary import parameters
from openmoba.records import disk


def test_a_finished_run_is_said_and_measured_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(finished)]) == 0
    assert "LM loss" in capsys.readouterr().out
    assert cli.main(["evaluate", str(finished), "--eval.windows", "2", "--out", str(tmp_path / "row.json")]) == 0
    assert "last 16" in capsys.readouterr().out
    assert cli.main(["evaluate", str(finished)]) == 0
    assert (
        f"last 16  {disk.read_json(finished / 'result.json')['eval']['trailing_loss']:.4f}" in capsys.readouterr().out
    )
    assert len(disk.read_json(tmp_path / "row.json")["windows"]["lm"]) == 2
    assert cli.main(["evaluate", str(tmp_path), "--data.source", str(tmp_path / "no.txt")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_options_left_out_are_those_of_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And an option that says the default is not one that was left out."""
    assert cli.main(["evaluate", str(finished), "--data.length", "32", "--eval.trailing", "8"]) == 0
    assert "last 8" in capsys.readouterr().out  # on the run's documents, which have other tokens than the default's
    assert cli.main(["train", str(finished), "--train.steps", str(TrainConfig().steps)]) == 2
    assert f"train.steps was 12 and is {TrainConfig().steps}" in capsys.readouterr().err
    # Fits what is stored, not the default of log_every:
    assert cli.main(["train", str(finished), "--train.checkpoint-every", "4"]) == 0


def test_overrides_are_any_value_and_kept_by_the_run(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tmp_path)]
    data = ["--data.source", config.data.source, "--data.cache", config.data.cache, "--data.hold-out", "4"]
    small = ["--data.tokenizer", "bytes", "--data.length", "64", "--train.steps", "2", "--eval.windows", "4"]
    model = ["--model.family", "mistral", "--model.size", "nano"]
    given = ["--model.overrides", "sliding_window", "None", "tie_word_embeddings", "False"]
    for arguments in ([*data, *small, *model, *given], given, []):
        assert cli.main([*command, *arguments]) == 0
    stored = disk.read_json(tmp_path / "config.json")["model"]["overrides"]
    assert stored == {"sliding_window": None, "tie_word_embeddings": False}
    assert cli.main([*command, "--model.overrides", "sliding_window", "3"]) == 2
    assert "holds another run: model.overrides was" in capsys.readouterr().err


def test_options_that_cannot_work_are_refused_before_the_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for command in ("evaluate", "evaluate needle"):
        assert cli.main([*command.split(), str(finished), "--out", str(tmp_path / "file" / "x.json")]) == 2
        out, error = capsys.readouterr()
        assert "cannot write into the folder of --out" in error
        assert out == ""


def test_a_dry_run_says_what_would_be_and_touches_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tmp_path / "run"), "--dry-run", "--data.source", str(tmp_path / "no such file")]
    size = ["--model.size", "14m", "--arm.name", "full", "--data.length", "4096", "--train.steps", "100"]
    assert cli.main([*command, *size]) == 0
    out = capsys.readouterr().out
    for said in (
        r"llama 14m, 14\.9 M parameters \(14\.2 M without embeddings\), vocabulary 2,048",
        r"attention +full attention",
        r"100 steps of 4 windows of 4,096 tokens: 1,638,400 tokens; 32 windows evaluated 1 time\n",
        r"6nd 1\.61e-06, chinchilla \S+, causal_exact \S+ PFLOP/s-days",
        r"about \S+ GB on one device",
        r"time +about .* on this machine, if training reaches 30% of the \S+ TFLOP/s",
    ):
        assert re.search(said, out), (said, out)
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--model.size", "15n"]) == 2
    assert cli.main(["train", str(finished), "--dry-run", "--train.learning-rate", "1"]) == 2
    assert "holds another run: train.learning_rate" in capsys.readouterr().err


def test_a_run_of_a_model_from_elsewhere_is_planned_and_named_as_that_model(
    config: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights,) = finished.glob("checkpoint-*")
    model = shutil.copytree(weights, tmp_path / "my-model")
    entries = disk.read_json(model / "config.json")
    shape = Shape.of(load_model(model), 64)
    said = f"that of {model}, {parameters(shape)}"
    assert cli.main(["train", str(tmp_path / "run"), "--dry-run", "--train.start-from", str(model)]) == 0
    assert f"{said}, vocabulary {entries['vocab_size']:,}" in capsys.readouterr().out
    heard = Heard()
    run_training(replace(config, train=replace(config.train, start_from=str(model))), tmp_path / "run", progress=heard)
    assert any(said in note for note in heard.notes)
    assert disk.read_json(tmp_path / "run" / "result.json")["size"] == "my-model"
    assert cli.main(["runs", str(tmp_path / "run")]) == 0
    assert "my-model" in capsys.readouterr().out.splitlines()[1].split()
    other = shutil.copytree(finished, tmp_path / "deeper")
    stored = disk.read_json(other / "config.json")
    stored["model"]["overrides"]["num_hidden_layers"] = 3
    disk.write_json(other / "config.json", stored)
    assert planned_shape(replace(config, train=replace(config.train, start_from=str(other)))).layers == 3


def test_runs_are_listed_side_by_side(
    config: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = replace(config, arm=ArmConfig("full"))
    interrupt(cut, tmp_path / "study" / "cut", 9)
    interrupt(replace(cut, eval=replace(cut.eval, windows=3)), tmp_path / "study" / "other", 7)
    (tmp_path / "study" / "broken").mkdir()
    (tmp_path / "study" / "broken" / "metrics.jsonl").write_text("{\n")
    assert cli.main(["runs", str(finished), str(tmp_path / "study")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:8] == ["run", "state", "arm", "size", "tokens", "LM", "trailing", "to"]
    assert head.endswith("MFU of data sheet  time")
    cells = {Path(line.split()[0]).name: line.split()[1:] for line in lines[:-1]}
    losses = {}
    for folder in (finished, tmp_path / "study" / "cut"):
        rows = disk.read(folder / "metrics.jsonl")
        losses[folder] = next(row["trailing_loss"] for row in reversed(rows) if row["kind"] == "eval")
    first, second = losses
    assert cells["run"][:4] == ["finished", "moba", "8/2", "nano"]
    assert cells["cut"][:4] == ["step", "8/12", "full", "nano"]
    assert cells["run"][-5] == f"{losses[finished]:.4f}"
    assert cells[first.name][-4] == "+0.0000"
    assert cells[second.name][-4] == f"{losses[second] - losses[first]:+.4f}"
    assert cells["other"][-4] == "+0.0000", "on other windows"
    assert lines[-1].startswith(f"not listed: {tmp_path / 'study' / 'broken'}: ")
    assert cli.main(["runs", str(tmp_path / "study" / "cut"), str(finished), str(finished)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[0]).name for line in lines] == ["cut", "run"], "in the order given, each once"
    assert lines[1].split()[-4] == f"{losses[finished] - losses[second]:+.4f}"
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", str(tmp_path / "empty")]) == 2
    assert "there are no runs below" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "study" / "broken")]) == 2
    assert "not listed: " in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_record_is_listed(config: RunConfig, tmp_path: Path, capsys: Any) -> None:
    tmp_path.joinpath("run").mkdir()
    disk.write_json(tmp_path / "run" / "failed.json", {"reason": "no number", "config": to_dict(config)})
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["failed", "moba", "8/2"]


def test_a_run_is_converted_without_its_training_state(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    command = ["convert", str(finished), str(out), "--block-size", "16", "--top-k", "2", "--full-layers", "spread:1"]
    assert cli.main(command) == 0
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {path.name for path in out.iterdir()}
    state = {
        "trainer_state.json",
        "complete.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    }
    assert not state & {path.name for path in out.iterdir()}
    assert load_model(out).config.moba == {"block_size": 16, "top_k": 2, "full_layers": "spread:1"}
