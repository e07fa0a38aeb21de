"""`openmoba bench attention`: time every contender on every case of a grid, one CSV row each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import openmoba
from openmoba.bench.cases import GRIDS, Case
from openmoba.bench.contenders import CONTENDERS
from openmoba.bench.inputs import Inputs, first_block_share, make_inputs
from openmoba.bench.machine import Machine, attempted, fill, say
from openmoba.bench.rows import read_rows
from openmoba.bench.table import Row, compared, markdown
from openmoba.bench.timing import Work, measure
from openmoba.limits import check_number


@dataclass(frozen=True)
class Attention:
    """Time MoBA attention against dense and sparse peers; the same command goes on where a stopped one ended."""

    grid: str = "headline"
    """"headline", "full", "short" (up to 4K tokens) or "peers" (three lengths) on a GPU, or "cpu"."""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Who is timed. FlashAttention 4 and FlashMoBA are left out where they are not installed."""
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
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        for name in self.contenders:
            if name not in CONTENDERS:
                raise ValueError(f"contenders must be of {', '.join(CONTENDERS)}, got {name!r}")
        device = torch.device("cuda" if torch.cuda.is_available() and self.grid != "cpu" else "cpu")
        if self.grid != "cpu" and device.type == "cpu":
            raise ValueError(f"grid {self.grid!r} needs a GPU; use the grid 'cpu'")
        rows = run_benchmark(
            GRIDS[self.grid], self.contenders, self.out, device=device, minutes=self.minutes, commit=self.commit
        )
        print(markdown(rows))


@dataclass
class Session(Machine):
    """One process of a benchmark: the machine, and what was measured on it so far."""

    rows: list[Row]


def run_benchmark(
    cases: Iterable[Case],
    contenders: Iterable[str],
    out: Path,
    *,
    device: torch.device,
    minutes: float | None = None,
    commit: str | None = None,
) -> list[Row]:
    """Measure what `out` does not hold yet, and append it there.

    Args:
        minutes: begin no measurement after this time; None for no limit.
        commit: recorded instead of the checkout's.

    Returns:
        The rows of these cases and contenders, also those that were there.
    """
    session = Session(device, commit, read_rows(out, Row))
    tasks = (
        (Row.of(name, case, **session.machine), partial(measure_row, name, case, session))
        for name, case in _tasks(list(cases), _present(contenders, device))
    )
    return fill(out, session.rows, tasks, minutes=minutes, told=_progress)


def measure_row(name: str, case: Case, session: Session) -> Row:
    """Measure one contender on one case. Its failure, out of memory included, is a row with an error."""
    row = Row.of(name, case, **session.machine, library=CONTENDERS[name].version())
    row = attempted(row, partial(_measured, name, case, session))
    session.tidy()
    return row


def _measured(name: str, case: Case, session: Session, row: Row) -> Row:
    contender, device = CONTENDERS[name], session.device
    rate = session.matrix_tflops(case.dtype)
    inputs = make_inputs(case, device)
    selected = None
    if name == "moba" or contender.kind == "mask":
        selected = openmoba.moba_select(inputs.q, inputs.k, block_size=case.block_size, top_k=case.top_k)
        row = replace(row, first_block_share=first_block_share(selected))
    if name == "moba":
        selected, row = None, replace(row, path=_path(case, inputs))
    forward = contender.build(case, inputs, selected)
    found = measure(Work(forward, (inputs.q, inputs.k, inputs.v), inputs.d_out), device)
    row = replace(row, **vars(found), matrix_tflops=rate)
    operations = case.operations(dense=contender.kind == "dense", scores=contender.kind == "moba")
    row = replace(row, roofline=operations / (rate * 1e9 * found.p50_ms))
    return compared(row, session.rows)


def _path(case: Case, inputs: Inputs) -> str:
    found = openmoba.explain(inputs.q, inputs.k, inputs.v, block_size=case.block_size, top_k=case.top_k)
    return f"{found.impl} {found.path}"


def _present(names: Iterable[str], device: torch.device) -> list[str]:
    """List the contenders that this machine has, in the order of `CONTENDERS`; says why the others are left out."""
    asked, present = set(names), []
    for name, contender in CONTENDERS.items():
        reason = contender.missing(device)
        if name in asked and reason is None:
            present.append(name)
        elif name in asked:
            say(f"left out: {name} ({reason})")
    return present


def _tasks(cases: list[Case], names: list[str]) -> Iterator[tuple[str, Case]]:
    """Order the work case by case; contenders that compile for every case come after all others."""
    for last in (False, True):
        for case in cases:
            for name in names:
                contender = CONTENDERS[name]
                if (contender.kind == "mask") == last and case.tokens <= (contender.longest or case.tokens):
                    yield name, case


def _progress(row: Row) -> str:
    settings = "" if row.block_size is None else f" {row.block_size}/{row.top_k} {row.routing}"
    case = f"{row.contender:<10} {row.passes} D={row.head_dim} T={row.tokens} B={row.batch}{settings}"
    return f"{case}: {row.error or f'{row.p50_ms:.3f} ms'}"
