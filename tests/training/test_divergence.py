"""Runs whose loss or gradient is no number any more: they stop, say what to lower, and keep what was before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import curve

from openmoba import cli
from openmoba.lab.config import RunConfig, stored_config
from openmoba.lab.errors import DivergenceError
from openmoba.lab.model.checkpoint import newest_checkpoint
from openmoba.lab.train.run import run_training
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RunTrainer.attend_as_configured

    def poison(trainer: RunTrainer, step: int) -> None:
        plain(trainer, step)
        if step == 6:
            with torch.no_grad():
                trainer.model.get_input_embeddings().weight.fill_(torch.nan)

    monkeypatch.setattr(RunTrainer, "attend_as_configured", poison)
    with pytest.raises(
        ValueError, match=r"not a finite number at step 7, nothing later is saved; lower train\.learning"
    ):
        run_training(config, tmp_path)
    assert [row["step"] for row in curve(tmp_path) if row["kind"] == "train"] == [2, 4, 6]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_gradient_that_is_no_number_is_divergence(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunTrainer, "_clip_grad_norm", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(DivergenceError, match=r"the gradient was not a finite number at step 2.*lower train\.learning"):
        run_training(short, tmp_path / "run")
    assert disk.read(tmp_path / "run" / "metrics.jsonl") == []


def test_a_run_that_diverges_keeps_its_settings(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first record, too: the bare command is about that run, and options change its settings."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_clip_grad_norm", lambda *_: torch.tensor(torch.nan))
        with pytest.raises(DivergenceError):
            run_training(short, folder)
        assert cli.main(["train", str(folder)]) == 2
    assert "the gradient was not a finite number at step 2" in capsys.readouterr().err
    assert stored_config(folder) == short
    assert cli.main(["runs", str(folder)]) == 0
    assert "failed" in capsys.readouterr().out
    assert cli.main(["train", str(folder), "--train.learning-rate", "1e-4"]) == 0
    assert stored_config(folder) == replace(short, train=replace(short.train, learning_rate=1e-4))
    assert not (folder / "failed.json").exists()


def test_what_diverged_in_fp32_is_not_advised_to_use_it(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower train\.learning_rate=1e\+30 or lower train\.clip=1\.0$"):
        run_training(replace(config, train=replace(config.train, learning_rate=1e30)), tmp_path)
