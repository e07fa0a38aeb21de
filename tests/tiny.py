"""A run of a second: four steps of a model of two narrow layers, on documents that a test writes; what a run says.

And what tests do to runs: stop them, damage their files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from openmoba.lab.progress import Progress
from openmoba.records import disk


class Notes(Progress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Heard(Notes):
    """Keeps steps of training too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def step(self, done: int, total: int, detail: str = "", share: float | None = None) -> None:
        if share is not None:  # of training, not of reading data
            self.steps.append(f"{done}/{total} {detail} {share:.2f}")


def write_texts(folder: Path, count: int = 8) -> None:
    folder.mkdir(exist_ok=True)
    for n in range(count):
        (folder / f"{n}.txt").write_text("".join(f"{i} times {n} is {i * n}, " for i in range(40)))


def tiny_config(root: Path, *, tokenizer: str = "bytes", **train: Any) -> RunConfig:
    """Records at steps 2 and 4, a checkpoint at both, an evaluation at the end; documents and cache below `root`."""
    write_texts(root / "texts")
    settings = {"steps": 4, "batch_size": 2, "log_every": 2, "checkpoint_every": 2} | train
    return RunConfig(
        data=DataConfig(
            str(root / "texts"), hold_out=4, tokenizer=tokenizer, vocab_size=270, length=32, cache=str(root / "cache")
        ),
        model=ModelConfig(size="nano", overrides={"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}),
        arm=ArmConfig("full"),
        train=TrainConfig(**settings),
        eval=EvalConfig(windows=4, trailing=8, position_range=16),
    )


def curve(folder: Path) -> list[dict[str, Any]]:
    """The records without measured time."""
    rows = disk.read(folder / "metrics.jsonl")
    for row in rows:
        for name in ("seconds", "tokens_per_second", "mfu"):
            row.pop(name, None)
        row["compute"].pop("accelerator_seconds")
    return rows


def interrupt(config: RunConfig, folder: Path, step: int, said: str | None = None) -> None:
    """Train until `step` has begun, then stop as Ctrl-C does: nothing is cleaned up, and `said` is told."""
    from openmoba.lab.train.run import run_training
    from openmoba.lab.train.trainer import RunTrainer

    plain = RunTrainer.attend_as_configured

    def stop(trainer: RunTrainer, at: int) -> None:
        if at == step:
            raise KeyboardInterrupt
        plain(trainer, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "attend_as_configured", stop)
        with pytest.raises(KeyboardInterrupt, match=said):
            run_training(config, folder)


_WAITING = """
import signal, sys
from openmoba import cli
from openmoba.lab.train.trainer import RunTrainer
plain = RunTrainer.training_step
def waiting(trainer, *args, **kwargs):
    while trainer.state.global_step == {step}:
        signal.pause()
    return plain(trainer, *args, **kwargs)
RunTrainer.training_step = waiting
cli.main(sys.argv[1:])
"""


def openmoba_until(step: int) -> list[str]:
    """The command `openmoba`, whose runs come no further than `step` steps: there is time to kill it."""
    return [sys.executable, "-c", _WAITING.format(step=step)]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def one_thread() -> dict[str, str]:
    """The environment of a process that runs beside others."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
