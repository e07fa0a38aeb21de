"""Settings that no run can have, and folders of other runs: refused before data are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import ModelConfig, RunConfig
from openmoba.lab.train import run as train_module
from openmoba.lab.train.run import run_training
from openmoba.records import disk


def test_another_configuration_in_the_same_folder_is_refused(config: RunConfig, finished: Path) -> None:
    other = replace(config, train=replace(config.train, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"holds another run: train\.learning_rate was 0\.005 and is 0\.001"):
        run_training(other, finished)


def test_a_run_keeps_its_sharding(config: RunConfig, finished: Path) -> None:
    other = replace(config, train=replace(config.train, fsdp=True))
    with pytest.raises(
        ValueError, match=r"began with train\.fsdp=False and keeps it.* got True; go on as it began, or"
    ):
        run_training(other, finished)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"size": "huge"}, r"unknown model\.size 'huge'; the sizes are nano, micro"),
        ("model", {"family": "lama"}, r"unknown model\.family 'lama'"),
        ("model", {"overrides": {"num_heads": 3}}, "configuration has no num_heads"),
        ("model", {"overrides": {"hidden_size": 63}}, r"do not fit a llama model.*\(63\) is not a mul"),
        ("arm", {"name": "hybrid", "full_layers": 9}, r"full_layers=9 exceeds the model's 2 layers"),
        ("train", {"checkpoint_every": 5}, r"checkpoint_every=5 must be a multiple of train\.log_every=2"),
        ("train", {"micro_batch_size": 3}, r"train\.batch_size=2 does not divide into 1 device"),
        ("train", {"fsdp": True}, r"train\.fsdp needs GPUs"),
        ("train", {"start_from": "/nowhere/model"}, "/nowhere/model"),
        ("eval", {"trailing": 70}, r"eval\.trailing=70 is more than a window of data\.length=32"),
    ],
)
def test_settings_are_checked_before_the_data_are_read(
    short: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(train_module, "load_data", None)
    wrong = replace(short, **{section: replace(getattr(short, section), **changes)})
    with pytest.raises(ValueError, match=message):
        run_training(wrong, tmp_path)
    assert not (tmp_path / "config.json").exists(), "a start that failed decides nothing for the next"
    assert disk.read(tmp_path / "metrics.jsonl") == []


def test_a_model_to_start_from_is_checked_before_the_data_are_read(
    short: RunConfig, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "load_data", None)
    start = replace(short, train=replace(short.train, start_from=str(copied)))
    with pytest.raises(ValueError, match=r"data\.length=40 exceeds the 32 positions"):
        run_training(replace(start, data=replace(start.data, length=40)), tmp_path / "new")
    with pytest.raises(ValueError, match=r"full_layers=9 exceeds"):
        run_training(replace(start, arm=ArmConfig("hybrid", full_layers=9)), tmp_path / "new")


def test_a_run_that_starts_from_another_says_the_same_model(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    for model, said in ((ModelConfig(size="micro"), "llama micro"), (ModelConfig("qwen3", "nano"), "qwen3 nano")):
        other = replace(config, model=model, train=replace(config.train, start_from=str(finished)))
        with pytest.raises(
            ValueError, match=rf"is a run of model\.family=llama model\.size=nano, this one says {said}"
        ):
            run_training(other, tmp_path)
    longer = replace(
        config, data=replace(config.data, length=65), train=replace(config.train, start_from=str(finished))
    )
    with pytest.raises(ValueError, match=r"data\.length=65 exceeds the 64 positions of the model"):
        run_training(longer, tmp_path / "longer")


@pytest.mark.parametrize("arm", ["full", "moba"])
def test_attention_dropout_is_refused_before_data_are_read(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """Of a fresh model and of one to start from; the attention function would refuse it in the first step."""
    monkeypatch.setattr(train_module, "load_data", None)
    model = ModelConfig(size="nano", overrides={"attention_dropout": 0.1})
    dropping = replace(config, model=model, arm=ArmConfig(arm, 8, 2))  # type: ignore[arg-type]
    for start in (None, str(finished)):
        with pytest.raises(ValueError, match=r"attention_dropout=0\.1 drops .* set it to 0 in model\.overrides"):
            run_training(replace(dropping, train=replace(config.train, start_from=start)), tmp_path)
