"""A run of a second: four steps of a model of two narrow layers, on documents that a test writes; what a run says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
