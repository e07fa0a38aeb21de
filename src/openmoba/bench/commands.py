"""`openmoba bench attention`, `decode` and `paged`: their options; torch is imported when they run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from openmoba.bench import cases
from openmoba.bench.cases import GRIDS
from openmoba.limits import check_count, check_number


@dataclass(frozen=True)
class Attention:
    """Time MoBA attention against dense and sparse peers; the same command goes on where a stopped one ended."""

    grid: str = "headline"
    """"headline", "full", "short" (up to 4K tokens) or "peers" (three lengths) on a GPU, or "cpu"."""
    contenders: tuple[str, ...] = ()
    """Who is timed, such as moba sdpa_cudnn; left out: all that this machine has and that are installed."""
    minutes: float | None = None
    """Begin no further measurement after this time."""
    out: Path = Path("attention.csv")
    """CSV file that rows are added to; what it holds for this commit and device is not measured again."""
    commit: str | None = None
    """Recorded instead of the checkout's, for a copy of its files; by default what git says."""

    def __post_init__(self) -> None:
        check_number("--minutes", self.minutes, 0)

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.bench.attention import run_benchmark
        from openmoba.bench.contenders import CONTENDERS
        from openmoba.bench.machine import device_for
        from openmoba.bench.table import markdown

        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        for name in self.contenders:
            if name not in CONTENDERS:
                raise ValueError(f"contenders must be of {', '.join(CONTENDERS)}, got {name!r}")
        contenders, device = self.contenders or CONTENDERS, device_for(self.grid)
        rows = run_benchmark(
            GRIDS[self.grid], contenders, self.out, device=device, minutes=self.minutes, commit=self.commit
        )
        print(markdown(rows))


@dataclass(frozen=True)
class Decode:
    """Time decoding over a cache against dense attention; the same command goes on where a stopped one ended."""

    lengths: tuple[int, ...] = tuple(1024 * k for k in (4, 16, 32, 64, 128, 256, 512, 1024))
    """Cached tokens per sequence."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences decoded together."""
    prefill: int = 2**20
    """Tokens of the prompt that is prefilled in chunks; 0 leaves that out."""
    chunk: int = 2**16
    """Tokens of a chunk; one size per file."""
    out: Path = Path("decode.csv")
    """CSV file that rows are added to; what it holds for this commit and device is not measured again."""
    commit: str | None = None
    """Recorded instead of the checkout's, for a copy of its files; by default what git says."""

    def __post_init__(self) -> None:
        for name in ("lengths", "batches"):
            for value in getattr(self, name):
                check_count(f"--{name}", value, 1)
        check_count("--prefill", self.prefill, 0)
        check_count("--chunk", self.chunk, 1)

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.bench.attention import open_session
        from openmoba.bench.decode import Shape, check_chunk, decode_tasks, prefill_tasks, told
        from openmoba.bench.machine import fill, gpu_for
        from openmoba.bench.table import markdown

        if self.prefill:
            check_chunk(self.chunk, self.out)
        shapes = [Shape(tokens, batch) for batch in self.batches for tokens in self.lengths]
        session = open_session(self.out, gpu_for("openmoba bench decode"), self.commit)
        tasks = chain.from_iterable(decode_tasks(session, shape) for shape in shapes)
        if self.prefill:
            tasks = chain(tasks, prefill_tasks(session, Shape(self.prefill, 1), self.chunk))
        print(markdown(fill(self.out, session.rows, tasks, minutes=None, told=told)))


@dataclass(frozen=True)
class Paged:
    """Time MoBA over a block table beside a contiguous cache; the same command goes on where a stopped one ended."""

    lengths: tuple[int, ...] = tuple(1024 * k for k in (32, 128, 512))
    """Cached tokens per sequence."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences decoded together."""
    prefill: int = 2**19
    """Tokens of the prompt whose last chunk is prefilled; 0 leaves that out."""
    chunk: int = 2**13
    """Tokens of the chunk."""
    out: Path = Path("paged.csv")
    """CSV file that rows are added to; what it holds for this commit and device is not measured again."""
    commit: str | None = None
    """Recorded instead of the checkout's, for a copy of its files; by default what git says."""

    def __post_init__(self) -> None:
        for tokens in self.lengths:
            check_count("--lengths", tokens, 1)
            check_pages("--lengths", tokens)
        for batch in self.batches:
            check_count("--batches", batch, 1)
        check_count("--prefill", self.prefill, 0)
        check_pages("--prefill", self.prefill)
        check_count("--chunk", self.chunk, 1)
        if self.prefill and self.chunk > self.prefill:
            raise ValueError(f"--chunk must be part of the --prefill of {self.prefill} tokens, got {self.chunk}")

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.bench.attention import open_session
        from openmoba.bench.decode import Shape, told
        from openmoba.bench.machine import fill, gpu_for
        from openmoba.bench.paged import markdown, paged_tasks

        session = open_session(self.out, gpu_for("openmoba bench paged"), self.commit)
        cases: list[tuple[Shape, int | None]] = [(Shape(self.prefill, 1), self.chunk)] if self.prefill else []
        cases += [(Shape(tokens, batch), None) for tokens in self.lengths for batch in self.batches]
        tasks = chain.from_iterable(paged_tasks(session, *case) for case in cases)
        print(markdown(fill(self.out, session.rows, tasks, minutes=None, told=told)))


def check_pages(name: str, tokens: int) -> None:
    """Raise ValueError unless so many tokens fill whole pages of every size."""
    largest = max(page for *_, pages in cases.PAGED for page in pages)
    if tokens % largest:
        raise ValueError(f"{name} must be a multiple of {largest} tokens, the largest page, got {tokens}")
