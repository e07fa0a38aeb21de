"""Measuring the cases of a grid, or one: its steps, its longest window, or a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config as compiler_config
from torch._dynamo.utils import counters

from openmoba.bench.machine import Machine, attempted, fill, say
from openmoba.bench.rows import read_rows
from openmoba.bench.timing import quantiles
from openmoba.bench.training.cases import TrainingCase, TrainingRow
from openmoba.bench.training.longest import find_longest
from openmoba.bench.training.loops import make_loop, operations
from openmoba.bench.training.profiles import describe, read_profile
from openmoba.bench.training.table import outcome
from openmoba.bench.training.watch import Watch
from openmoba.lab.measure.compute import Shape
from openmoba.lab.model.compile import strict

# Graphs of one function, at most: the compiler's default, which libraries change for the whole process.
_GRAPHS = 8
_GRAPHS_OF_LENGTHS = 64  # every length may be another graph


def run_training_benchmark(
    cases: Sequence[TrainingCase],
    out: Path,
    machine: Machine,
    *,
    minutes: float | None = None,
    step_seconds: float = 20.0,
) -> list[TrainingRow]:
    """Measure what `out` does not hold yet, and append it there.

    Returns:
        The rows of these cases, also those that were there.
    """
    names = {blank(case, machine).key: " ".join(case.words) for case in cases}
    tasks = ((blank(case, machine), partial(measure_case, case, machine, step_seconds)) for case in cases)
    rows = read_rows(out, TrainingRow)
    return fill(out, rows, tasks, minutes=minutes, told=lambda row: f"{names[row.key]}: {outcome(row)}")


def measure_case(case: TrainingCase, machine: Machine, step_seconds: float) -> TrainingRow:
    """Measure one case. Its failure, out of memory included, is a row with an error."""

    def measure(row: TrainingRow) -> TrainingRow:
        return _longest(case, machine, row, step_seconds) if case.kind == "longest" else _steps(case, machine, row)

    with _fresh_compiler(case):
        row = attempted(blank(case, machine), measure)
        row = replace(row, graphs=counters["stats"]["unique_graphs"] if case.layers != "eager" else None)
    machine.tidy()
    return row


def trace(case: TrainingCase, machine: Machine, path: Path, steps: int = 3) -> str:
    """Write a Chrome trace of some steps of `case` and return what takes longest in them."""
    say(f"tracing {' '.join(case.words)}")
    watch = Watch(machine.device, profiled=steps)
    with _fresh_compiler(case):
        watch.run(make_loop(case, machine.device))
    assert watch.profile is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    watch.profile.export_chrome_trace(str(path))
    return describe(read_profile(watch.profile), steps, quantiles(watch.times_ms)[1])


def _steps(case: TrainingCase, machine: Machine, row: TrainingRow) -> TrainingRow:
    rate = machine.matrix_tflops(row.dtype)
    loop, watch = make_loop(case, machine.device), Watch(machine.device)
    watch.run(loop)
    seen = read_profile(watch.profile)
    row = replace(
        _timed(case, row, loop.model, watch, rate),
        attention_share=seen.attention_share,
        attention_kernel=seen.attention_kernel and seen.attention_kernel[:80],
        busy_ms=seen.busy_ms,
    )
    return replace(row, loss=loop.loss())


def _longest(case: TrainingCase, machine: Machine, row: TrainingRow, seconds: float) -> TrainingRow:
    rate = machine.matrix_tflops(row.dtype)
    found = find_longest(case, machine, seconds)
    row = replace(row, tokens=found.tokens, limit=found.limit)
    return _timed(case, row, found.loop.model, found.watch, rate)


def _timed(case: TrainingCase, row: TrainingRow, model: Any, watch: Watch, rate: float) -> TrainingRow:
    """Fill in the times of `row` and what follows from them."""
    shape = Shape.of(model, row.tokens)
    p20, p50, p80 = quantiles(watch.times_ms)
    tflops = operations(case, model, row.tokens) / p50 / 1e9
    return replace(
        row,
        head_dim=shape.head_dim,
        total=shape.total,
        non_embedding=shape.non_embedding,
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        samples=len(watch.times_ms),
        tokens_per_second=1000 * row.batch * row.tokens / p50,
        tflops=tflops,
        matrix_tflops=rate,
        mfu=tflops / rate,
        peak_mb=watch.held_mb if row.layers == "graphed" else watch.peak_mb,
        first_ms=watch.first_ms,
    )


def blank(case: TrainingCase, machine: Machine) -> TrainingRow:
    """Make the row, before it is measured."""
    dtype = "bfloat16" if machine.device.type == "cuda" else "float32"
    return TrainingRow.of(case, dtype, **machine.machine, transformers=version("transformers"))


@contextmanager
def _fresh_compiler(case: TrainingCase) -> Iterator[None]:
    """Forget compiled graphs afterwards; a limit of recompilations is an error, not a silent eager run."""
    limit = _GRAPHS_OF_LENGTHS if case.kind == "longest" else _GRAPHS
    counters.clear()
    with strict(), compiler_config.patch(recompile_limit=limit):
        yield
    torch.compiler.reset()
