"""Key convolution in the laboratory: an option of every arm, kept over switches, resumption and fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import curve, interrupt
from transformers import Trainer

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import ModelConfig, RunConfig, TrainConfig
from openmoba.lab.measure.compute import Shape, training_compute
from openmoba.lab.model.build import SIZES, build_model, load_model, set_attention
from openmoba.lab.train.run import run_training
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk

SHORT = TrainConfig(steps=4, batch_size=4, log_every=1, checkpoint_every=4, learning_rate=5e-3)


def test_an_arm_starts_as_without_it(config: RunConfig, tmp_path: Path) -> None:
    """Full attention with it: the first loss is that of full attention, the later ones are its own."""
    losses = []
    for key_conv in (None, 4):
        folder = tmp_path / str(key_conv)
        result = run_training(replace(config, arm=ArmConfig("full", key_conv=key_conv), train=SHORT), folder)
        losses.append([row["loss"] for row in curve(folder) if row["kind"] == "train"])
        assert result["config"]["arm"]["key_conv"] == key_conv
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]
    model = load_model(next(folder.glob("checkpoint-*")))
    assert model.config.moba["key_conv"] == 4
    weights = [weight for name, weight in model.named_parameters() if "key_conv" in name]
    assert len(weights) == SIZES["nano"].layers
    assert all((weight != 0).any() for weight in weights)


def test_a_time_hybrid_keeps_it_over_the_switch(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after the switch, the run is that which was never stopped."""
    timed = replace(config, arm=ArmConfig("time_hybrid", 8, 2, switch_at=0.5, key_conv=4))
    seen: list[dict[str, Any]] = []
    plain = RunTrainer.attend_as_configured

    def spy(trainer: RunTrainer, step: int) -> None:
        plain(trainer, step)
        seen.append(trainer.model.config.moba)

    monkeypatch.setattr(RunTrainer, "attend_as_configured", spy)
    run_training(timed, tmp_path / "whole")
    assert [attention["full_layers"] for attention in seen] == [0] * 6 + ["all"] * 6
    assert {attention["key_conv"] for attention in seen} == {4}
    monkeypatch.setattr(RunTrainer, "attend_as_configured", plain)
    interrupt(timed, tmp_path / "cut", 9)
    run_training(timed, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_fine_tuning_goes_on_with_it_or_says_what_would_be_lost(
    config: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arm = ArmConfig("moba", 8, 2, key_conv=4)
    run_training(replace(config, arm=arm, train=SHORT), tmp_path / "first")
    tuned = replace(config, arm=replace(arm, name="full"), train=replace(SHORT, start_from=str(tmp_path / "first")))
    result = run_training(tuned, tmp_path / "tuned")
    assert result["eval"]["lm_loss"] < disk.read_json(tmp_path / "first" / "result.json")["eval"]["lm_loss"]
    with pytest.raises(ValueError, match="key convolution of width 4 is trained"):
        run_training(replace(tuned, arm=ArmConfig("full")), tmp_path / "lost")
    assert not (tmp_path / "lost" / "metrics.jsonl").exists()
    assert cli.main(["evaluate", str(tmp_path / "tuned")]) == 0
    assert f"{result['eval']['lm_loss']:.4f}" in capsys.readouterr().out


def test_its_cost_is_that_of_its_parameters() -> None:
    """A multiply-add a token and weight, three times with the backward pass: in every convention through N."""
    counts = []
    for key_conv in (None, 4):
        arm = ArmConfig("full", key_conv=key_conv)
        model = build_model(ModelConfig(size="nano"), 257, 64, seed=0)
        set_attention(model, arm.attention(0, 1))
        assert all((weight == 0).all() for name, weight in model.named_parameters() if "key_conv" in name)
        shape = Shape.of(model, 64)
        counts.append((shape.non_embedding, training_compute(shape, arm, 1, 1, 1, 0.0)))
    added = SIZES["nano"].layers * SIZES["nano"].hidden * 4
    assert counts[1][0] - counts[0][0] == added
    for convention in ("6nd", "chinchilla", "causal_exact"):
        operations = (counts[1][1][convention] - counts[0][1][convention]) * 8.64e19
        assert operations == pytest.approx(3 * 2 * added * 64, rel=1e-6)


def test_it_decays_like_other_matrices() -> None:
    model = build_model(ModelConfig(size="nano"), 257, 64, seed=0)
    set_attention(model, ArmConfig("full", key_conv=4).attention(0, 1))
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert {name for name, _ in model.named_parameters() if "key_conv" in name} <= set(decayed)


def test_bad_widths() -> None:
    with pytest.raises(ValueError, match="key_conv is a width >= 2"):
        ArmConfig(key_conv=1)
    with pytest.raises(ValueError, match=r"arm\.name to full"):
        ArmConfig("hybrid", full_layers="all")


def test_what_a_run_says_of_it() -> None:
    """In the summary of a run and in the table of runs."""
    full, timed = ArmConfig("full", key_conv=4), ArmConfig("time_hybrid", 8, 2, switch_at=0.5, key_conv=4)
    assert full.describe(8, 10) == "full attention, key convolution over 4 tokens"
    assert timed.describe(8, 10).endswith("full attention from step 6 on, key convolution over 4 tokens")
    assert [arm.short for arm in (full, timed)] == ["full key-conv 4", "time_hybrid 8/2 key-conv 4"]
