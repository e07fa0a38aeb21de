"""`openmoba train` and `openmoba evaluate`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import tyro

from openmoba.lab.claims import claim, holder
from openmoba.lab.config import DataConfig, EvalConfig, RunConfig, stored_config
from openmoba.lab.progress import TerminalProgress
from openmoba.lab.records import write_json


@dataclass(frozen=True)
class Train:
    """Train one model into a folder. The same command again resumes a killed run and skips a finished one.

    Several devices: torchrun --nproc-per-node 2 -m openmoba.cli train FOLDER ...
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the run. Options left out are those of the run that the folder holds, if it holds one."""
    options: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    dry_run: bool = False
    """Check the settings, say what the run would be (parameters, tokens, compute, about how much memory and time),
    and stop; no data are read and nothing is written."""

    def as_stored(self) -> Train:
        """With the settings of the run in the folder, but no model.overrides: `run` adds those if none are given."""
        options = self._stored() or self.options
        # tyro would read a default that is not empty as options --model.overrides.KEY.
        return replace(self, options=replace(options, model=replace(options.model, overrides={})))

    def _stored(self) -> RunConfig | None:
        return stored_config(self.folder) if (self.folder / "config.json").exists() else None

    def _settings(self) -> RunConfig:
        """The options, with the overrides of the run in the folder if none are given."""
        stored = self._stored()
        if stored is None or self.options.model.overrides:
            return self.options
        return replace(self.options, model=replace(self.options.model, overrides=stored.model.overrides))

    def run(self) -> None:
        """Train, and say where the result is."""
        import torch

        from openmoba.lab.train import check_run, run_training

        if self.dry_run:
            from openmoba.lab.summary import plan_text

            check_run(self._settings(), self.folder)
            print(f"{self.folder}\n{plan_text(self._settings())}")
            return
        with claim(self.folder) if os.environ.get("RANK", "0") == "0" else nullcontext(True) as mine:
            if not mine:
                raise ValueError(f"{self.folder} is being trained by {holder(self.folder)}; wait for it, or stop it")
            result = run_training(self._settings(), self.folder, progress=TerminalProgress(self.folder.name))
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
    """Validation documents and window length; of a run, by default its own."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured; of a run, by default what it measured."""
    out: Path | None = None
    """JSON file for the measurement, with every window's loss."""

    def as_stored(self) -> Evaluate:
        """With the settings of the run that is measured."""
        from openmoba.lab.data import data_of_run
        from openmoba.lab.model import is_run

        if not is_run(self.source):
            return self
        return replace(self, data=data_of_run(self.source), eval=stored_config(self.source).eval)

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.lab.evaluate import evaluate_source

        if self.out is not None:
            make_parent(self.out)
            if self.out.is_dir():
                raise ValueError(f"--out {self.out} is a folder; name a file")
        row = evaluate_source(self.source, self.data, self.eval, TerminalProgress(Path(self.source).name))
        print(_losses(row))
        if self.out is not None:
            write_json(self.out, {"source": self.source, **row})


def make_parent(out: Path) -> None:
    """Make the folder that `out` will lie in, before the work whose result it takes.

    Raises:
        ValueError: there can be no such folder, or nothing written into it.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into the folder of --out {out}: {error.strerror}; choose another") from error


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
