"""Runs that tests share: one of twelve steps that learns something, and a short one whose copies tests may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import tiny_config, write_texts

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from openmoba.lab.progress import Progress
from openmoba.lab.train import run as train_module
from openmoba.lab.train.run import run_training


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 12 steps on texts that a small model learns something about."""
    root = tmp_path_factory.mktemp("corpus")
    write_texts(root / "texts")
    return RunConfig(
        data=DataConfig(str(root / "texts"), hold_out=4, tokenizer="bytes", length=64, cache=str(root / "cache")),
        model=ModelConfig(size="nano"),
        arm=ArmConfig("moba", block_size=8, top_k=2),
        train=TrainConfig(steps=12, batch_size=4, log_every=2, checkpoint_every=4, learning_rate=5e-3),
        eval=EvalConfig(windows=4, every=6, trailing=16, position_range=16),
    )


@pytest.fixture(scope="session")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, trained without interruption; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_training(config, folder)
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where documents and cache of the short run are."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="session")
def short(root: Path) -> RunConfig:
    """A run of 4 steps."""
    return tiny_config(root)


@pytest.fixture(scope="session")
def trained(short: RunConfig, root: Path) -> Path:
    """That run, finished, with its checkpoints of steps 2 and 4; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "prune", lambda *_, **__: None)
        run_training(short, root / "run")
    return root / "run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def cut(copied: Path) -> Path:
    """The same without its result."""
    (copied / "result.json").unlink()
    return copied


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs say."""
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    return said
