"""`openmoba train` and `openmoba evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from openmoba.lab.config import DataConfig, EvalConfig, RunConfig, from_dict
from openmoba.lab.progress import TerminalProgress
from openmoba.lab.records import read_json, write_json


@dataclass(frozen=True)
class Train:
    """Train one model into a folder. The same command again resumes a killed run and skips a finished one.

    Several devices: torchrun --nproc-per-node 2 -m openmoba.cli train FOLDER ...
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the run. Without options, a folder that holds a run goes on as it was configured."""
    options: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def run(self) -> None:
        """Train, and say where the result is."""
        import torch

        from openmoba.lab.train import run_training

        config, stored = self.options, self.folder / "config.json"
        if config == RunConfig() and stored.exists():
            config = from_dict(RunConfig, read_json(stored))
        result = run_training(config, self.folder, progress=TerminalProgress(self.folder.name))
        if result:
            print(_losses(result["eval"]), f"{self.folder / 'result.json'}", sep="\n")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # whose threads must not outlive the interpreter


@dataclass(frozen=True)
class Evaluate:
    """LM, position-wise and trailing loss of a trained model, with the attention saved in it."""

    source: tyro.conf.Positional[str]
    """A run's folder, a model's folder, or a model of the hub."""
    data: DataConfig = field(default_factory=DataConfig)
    """Validation documents and window length. Without such options, a run is measured on its own."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured. Without such options, what the run measured."""
    out: Path | None = None
    """JSON file for the measurement, with every window's loss."""

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.lab.evaluate import evaluate_source

        data = None if self.data == DataConfig() else self.data
        evaluation = None if self.eval == EvalConfig() else self.eval
        row = evaluate_source(self.source, data, evaluation, TerminalProgress(Path(self.source).name))
        print(_losses(row))
        if self.out is not None:
            write_json(self.out, {"source": self.source, **row})


def _losses(row: dict[str, Any]) -> str:
    """An evaluation as a table: what, mean in nats, 95 % interval."""
    lines = [
        ("LM loss", row["lm_loss"], row["intervals"]["lm"]),
        (f"last {row['trailing']}", row["trailing_loss"], row["intervals"]["trailing"]),
        *((f"{part['start']}-{part['end']}", part["loss"], part["interval"]) for part in row["position_loss"]),
    ]
    return "\n".join(
        f"{name:>14}  {loss:.4f}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
        for name, loss, interval in lines
        if loss is not None
    )
