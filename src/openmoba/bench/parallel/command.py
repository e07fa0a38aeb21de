"""`torchrun --nproc-per-node N -m openmoba.bench parallel`: time one sequence over N devices, one CSV row a case."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed

from openmoba.bench.machine import Machine, failure, now, say
from openmoba.bench.parallel.cases import GRIDS, ParallelCase, ParallelRow, compared, markdown
from openmoba.bench.rows import append_row, read_rows

PATIENCE = timedelta(minutes=3)  # for a device that compiles while the others wait


@dataclass(frozen=True)
class Parallel:
    """Time one sequence over the devices of torchrun, and with one of them the whole; the same command goes on."""

    grid: str = "headline"
    """"headline" (attention and its transfers at 256K and 1M tokens, a step of a 545M hybrid at 512K), "attention"
    (of these both passes, each way as it is balanced), "step-LENGTH" (such a step at a length, such as step-768K),
    "smoke" (some of each, small, in seconds), or "cpu"."""
    out: Path = Path("parallel.csv")
    """CSV file that rows are added to; what it holds for this commit and device is not measured again."""
    commit: str | None = None
    """Recorded instead of the checkout's, for a copy of its files; by default what git says."""

    def run(self) -> None:
        """Measure, and print a table."""
        from openmoba.parallel.collectives import leave_group

        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if "RANK" not in os.environ:
            raise ValueError(
                "bench parallel is started by torchrun: torchrun --nproc-per-node 2 -m openmoba bench parallel ..."
            )
        on_gpu = self.grid != "cpu"
        if on_gpu and not torch.cuda.is_available():
            raise ValueError(f"grid {self.grid!r} needs GPUs; use the grid 'cpu'")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
        try:
            rows = run_parallel_benchmark(GRIDS[self.grid], self.out, Machine(device, self.commit))
        except Exception:
            _leave_at_once()
        if distributed.get_rank() == 0:
            print(markdown(rows))
        leave_group()


def run_parallel_benchmark(cases: Sequence[ParallelCase], out: Path, machine: Machine) -> list[ParallelRow]:
    """Measure on all devices what `out` does not hold yet; the first process appends it there.

    Returns:
        The rows of these cases, also those that were there.

    Raises:
        Exception: of the first case that fails, after its row: devices are out of step then. The same command goes on
            behind it.
    """
    from openmoba.bench.parallel.measure import measure_case, slowest  # which takes a second to import

    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    done = {row.key: row for row in read_rows(out, ParallelRow)}
    slowest([0.0], machine.device)  # all have read it before the first process adds to it
    wanted = []
    asked = dict.fromkeys(case.on(ranks) for case in cases if ranks > 1 or case.kind != "transfer")
    for number, case in enumerate(asked, 1):
        start = time.monotonic()
        row = ParallelRow.of(case, ranks, **machine.machine)
        if row.key not in done:
            row = replace(row, time=now())
            try:
                row = compared(measure_case(case, row, machine.device), done.values())
            except Exception as error:
                _append_failure(out, replace(row, error=failure(error)), rank)
                raise
            if rank == 0:
                append_row(out, row)
                took = time.monotonic() - start
                say(f"{number} of {len(asked)}, {took:.0f} s: {case.words} on {ranks}: {row.p50_ms:.3f} ms")
            done[row.key] = row
            machine.tidy()
        wanted.append(done[row.key])
    return wanted


def _append_failure(out: Path, row: ParallelRow, rank: int) -> None:
    """Write a failure down, once: it may be that of one process, for which the others wait, or of all."""
    time.sleep(min(rank, 1))
    if rank == 0 or row.key not in {other.key for other in read_rows(out, ParallelRow)}:
        append_row(out, row)


def _leave_at_once() -> NoReturn:
    """Say what failed and end the process: in an orderly end it might wait for transfers that nobody takes part in.

    torchrun ends the others then.
    """
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
