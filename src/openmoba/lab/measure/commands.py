"""`openmoba evaluate`, `openmoba evaluate needle` and `openmoba generate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import tyro

from openmoba.lab.config import DataConfig, EvalConfig, stored_config
from openmoba.lab.progress import Progress, TerminalProgress
from openmoba.lab.run_files import is_run
from openmoba.limits import check_count, check_number
from openmoba.records.disk import write_json


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
        """Return the command with the settings of the run that is measured."""
        from openmoba.lab.data.load import data_of_run

        if not is_run(self.source):
            return self
        return replace(self, data=data_of_run(self.source), eval=stored_config(self.source).eval)

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.lab.measure.evaluate import evaluate_source

        if self.out is not None:
            make_parent(self.out, "")
        row = evaluate_source(self.source, self.data, self.eval, TerminalProgress(Path(self.source).name))
        print(losses_table(row))
        if self.out is not None:
            write_json(self.out, {"source": self.source, **row})


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model; the text goes to standard output, the speed to standard error."""

    source: tyro.conf.Positional[str]
    """A run's folder, a model's folder, or a model of the hub."""
    prompt: str | None = None
    """Text to continue; without it, that of --file, or standard input."""
    file: Path | None = None
    """File with the text to continue."""
    max_new_tokens: int = 128
    """How many tokens to add at most."""
    temperature: float = 0.0
    """0 takes the likeliest token, more samples."""
    seed: int = 0
    """Of the sampling."""
    prefill_chunk: int | None = None
    """Tokens of the prompt per forward pass; left out, the prompt is taken whole."""

    def __post_init__(self) -> None:
        check_count("--max-new-tokens", self.max_new_tokens, 1)
        check_number("--temperature", self.temperature, 0)
        check_count("--seed", self.seed, 0, 2**63 - 1)
        check_count("--prefill-chunk", self.prefill_chunk, 1)

    def run(self) -> None:
        """Generate."""
        from openmoba.lab.measure.generate import generate_text, read_prompt

        speed = generate_text(
            self.source,
            read_prompt(self.prompt, self.file),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            prefill_chunk=self.prefill_chunk,
            progress=TerminalProgress("generate"),
        )
        print(speed, file=sys.stderr)


@dataclass(frozen=True)
class Needle:
    """Needle in a haystack: a number hidden in real long documents, asked for at their end; one page for all models.

    All models must read the same tokens. Differences are taken from the first with full attention, else from the first.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, models' folders, or models of the hub; of a study's folder all runs whose weights are there."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of the examples."""
    depths: int = 6
    """Places of the needle, evenly from the beginning of the document to its end."""
    samples: int = 16
    """Documents per length, the same at every depth."""
    seed: int = 0
    """Of the hidden numbers."""
    data: DataConfig = field(default_factory=DataConfig)
    """Validation documents; of runs, by default their own."""
    out: Path = Path("needle")
    """Name of what is written: OUT.md, a page, OUT.jsonl, the record, and the heat maps OUT.png and OUT.svg."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("name a run, a study's folder or a model to look for needles in")
        for length in self.lengths:
            check_count("--lengths", length, 2)
        check_count("--depths", self.depths, 1)
        check_count("--samples", self.samples, 1)
        check_count("--seed", self.seed, 0, 2**63 - 1)

    @property
    def tokens(self) -> int:
        """Tokens of the forward passes of one model; every length is read once more, without a needle."""
        return sum(set(self.lengths)) * self.samples * (self.depths + 1)

    def as_stored(self) -> Needle:
        """Return the command with the documents of the runs that are measured."""
        from openmoba.lab.measure.needle import data_of_runs

        data = data_of_runs(self._models(Progress()))
        return self if data is None else replace(self, data=data)

    def run(self) -> None:
        """Measure, and write the record, the page and the charts."""
        from openmoba.lab.measure.needle import measure_needles
        from openmoba.lab.measure.needle_page import SUFFIXES, needle_table, write_needles

        make_parent(self.out, *SUFFIXES)
        progress = TerminalProgress("needle")
        searches = measure_needles(
            self._models(progress),
            lengths=self.lengths,
            depths=self.depths,
            samples=self.samples,
            data=self.data,
            seed=self.seed,
            progress=progress,
        )
        files = write_needles(searches, self.out)
        print(*needle_table(searches), "", *files, sep="\n")

    def _models(self, progress: Progress) -> list[str]:
        from openmoba.lab.measure.needle import models_in

        return list(dict.fromkeys(model for source in self.sources for model in models_in(source, progress)))


def make_parent(out: Path, *suffixes: str) -> None:
    """Make the folder of the files `out` + suffix, before the work whose result they take.

    Raises:
        ValueError: there can be no such folder, nothing written into it, or a folder is where a file is to be.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into the folder of --out {out}: {error.strerror}; choose another") from error
    for file in (out.with_name(f"{out.name}{suffix}") for suffix in suffixes):
        if file.is_dir():
            raise ValueError(f"--out {file} is a folder; name a file")


def losses_table(row: dict[str, Any]) -> str:
    """Write an evaluation as a table: what, mean in nats, 95 % interval."""
    lines = [
        ("LM loss", row["lm_loss"], row["intervals"]["lm"]),
        (f"last {row['trailing']}", row["trailing_loss"], row["intervals"]["trailing"]),
        *((f"with {cut['context']}", cut["loss"], cut["interval"]) for cut in row.get("context_loss", [])),
        *((f"{part['start']}-{part['end']}", part["loss"], part["interval"]) for part in row["position_loss"]),
    ]
    return "\n".join(
        f"{name:>14}  {loss:.4f}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
        for name, loss, interval in lines
        if loss is not None
    )
