"""Time every contender on every case of a grid, one CSV row each: `openmoba bench attention`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import openmoba
from openmoba.bench.cases import Case
from openmoba.bench.contenders import CONTENDERS
from openmoba.bench.inputs import Inputs, first_block_share, make_inputs
from openmoba.bench.machine import Machine, attempted, fill, say
from openmoba.bench.rows import read_rows
from openmoba.bench.table import Row, compared
from openmoba.bench.timing import Work, measure


@dataclass
class Session(Machine):
    """One process of a benchmark: the machine, and what was measured on it so far."""

    rows: list[Row]


def open_session(out: Path, device: torch.device, commit: str | None) -> Session:
    """Begin where the rows of a file end."""
    return Session(device, commit, read_rows(out, Row))


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
    session = open_session(out, device, commit)
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
