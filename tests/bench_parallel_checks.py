"""The benchmark of two processes, after that of one: see `test_bench_parallel.py`. Nothing here asserts a speed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_checks
from torch import distributed

from openmoba.bench import timing
from openmoba.bench.machine import Machine
from openmoba.bench.parallel import measure
from openmoba.bench.parallel.cases import GRIDS, ParallelRow
from openmoba.bench.rows import read_rows

CASES = GRIDS["cpu"]
timing.SECONDS = 0.0


def out() -> Path:
    return Path(sys.argv[1]) / "parallel.csv"


def bench() -> list[ParallelRow]:
    measure.STEPS = 1
    return measure.run_parallel_benchmark(CASES, out(), Machine(torch.device("cpu"), "abc"))


def alone() -> list[str]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return [row.way for row in bench()]


def together() -> None:
    rows = bench()
    distributed.barrier()
    assert [(row.kind, row.way, row.layout) for row in rows] == [(case.kind, case.way, case.layout) for case in CASES]
    for row in rows:
        assert row.ranks == 2
        assert row.p50_ms
        assert row.error is None
        assert (row.speedup is not None) == (row.kind != "transfer")
        assert (row.gb_per_second is not None) == (row.kind == "transfer")
        assert (row.tokens_per_second is not None) == (row.kind == "step")
    written = read_rows(out(), ParallelRow)
    assert [row.ranks for row in written] == [1] * 2 + [2] * len(CASES)
    assert [replace(row, time=None) for row in written[2:]] == [replace(row, time=None) for row in rows]
    assert bench() == written[2:]  # nothing is measured again
    distributed.barrier()
    assert read_rows(out(), ParallelRow) == written


def failing() -> None:
    """A failure is a row, ends all processes, and the same command goes on behind it."""
    case = replace(CASES[0], tokens=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_case", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure.run_parallel_benchmark([case], out(), Machine(torch.device("cpu"), "abc"))
    distributed.barrier()
    rows = measure.run_parallel_benchmark([case], out(), Machine(torch.device("cpu"), "abc"))
    assert rows[0].error == "ZeroDivisionError: division by zero"


def one_failing() -> None:
    """The row of a failure in one process, for which the others would wait, is there too."""
    case = replace(CASES[0], tokens=104)
    machine = Machine(torch.device("cpu"), "abc")

    def fail_in_the_second(*_: object) -> ParallelRow:
        if distributed.get_rank() == 1:
            raise MemoryError("full")
        raise KeyboardInterrupt  # as torchrun ends it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_case", fail_in_the_second)
        with pytest.raises((MemoryError, KeyboardInterrupt)):
            measure.run_parallel_benchmark([case], out(), machine)
    distributed.barrier()
    assert measure.run_parallel_benchmark([case], out(), machine)[0].error == "MemoryError: full"


if __name__ == "__main__":
    run_checks({"together": together, "failing": failing, "one failing": one_failing}, {"alone": alone})
