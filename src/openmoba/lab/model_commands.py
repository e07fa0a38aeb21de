"""`openmoba convert`, `openmoba generate` and `openmoba evaluate needle`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from openmoba.config import MobaConfig
from openmoba.lab.commands import make_parent
from openmoba.lab.config import DataConfig
from openmoba.lab.progress import TerminalProgress
from openmoba.limits import check_count, check_number


@dataclass(frozen=True)
class Convert:
    """Make a MoBA checkpoint of a Llama, Qwen, Mistral ... checkpoint: the same weights, sparse attention."""

    model: tyro.conf.Positional[str]
    """A run's folder, a model's folder, or a model of the hub."""
    out: tyro.conf.Positional[Path]
    """Folder of the new checkpoint."""
    block_size: int
    """Tokens per block."""
    top_k: int
    """Blocks each query reads, its own included."""
    full_layers: str = "none"
    """Layers that keep full attention: "none", "last:3", "first:3", "spread:3" (evenly), or indices: "0,15,31"."""
    key_conv: int | None = None
    """Width in tokens, such as 4, of a convolution over the keys of every layer, to be trained; left out: none."""

    def run(self) -> None:
        """Convert, and say how to load the result."""
        from openmoba.hf.checkpoint import convert
        from openmoba.lab.model import model_folder

        settings = MobaConfig(self.block_size, self.top_k, self.full_layers, self.key_conv)
        with model_folder(self.model) as folder:
            convert(folder, self.out, settings)
        print(f'import openmoba.hf, then AutoModelForCausalLM.from_pretrained("{self.out}")')


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
        from openmoba.lab.generate import generate_text, read_prompt

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
    """Needle in a haystack: a number hidden in real long documents, asked for at their end."""

    source: tyro.conf.Positional[str]
    """A run's folder, a model's folder, or a model of the hub."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of the examples."""
    depths: int = 5
    """Places of the needle, evenly from the beginning of the document to its end."""
    samples: int = 8
    """Documents per length and depth."""
    seed: int = 0
    """Of the hidden numbers."""
    data: DataConfig = field(default_factory=DataConfig)
    """Validation documents; of a run, by default its own."""
    out: Path = Path("needle")
    """Name of the table and the charts: OUT.csv, OUT.png, OUT.svg."""

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_count("--lengths", length, 2)
        check_count("--depths", self.depths, 1)
        check_count("--samples", self.samples, 1)
        check_count("--seed", self.seed, 0, 2**63 - 1)

    def as_stored(self) -> Needle:
        """With the documents of the run that is measured."""
        from openmoba.lab.data import data_of_run
        from openmoba.lab.model import is_run

        return replace(self, data=data_of_run(self.source)) if is_run(self.source) else self

    def run(self) -> None:
        """Measure, and write the table and the charts."""
        from openmoba.lab.needle import measure_needle, write_needle

        make_parent(self.out)
        cells = measure_needle(
            self.source,
            lengths=self.lengths,
            depths=self.depths,
            samples=self.samples,
            data=self.data,
            seed=self.seed,
            progress=TerminalProgress("needle"),
        )
        print(*write_needle(cells, self.out, title=f"Needle in a haystack, {self.source}"), sep="\n")
