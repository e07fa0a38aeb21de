"""`torchrun --nproc-per-node N -m openmoba.bench parallel`: time one sequence over N devices, one CSV row a case."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from openmoba.bench.parallel.cases import GRIDS, markdown


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
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if "RANK" not in os.environ:
            raise ValueError(
                "bench parallel is started by torchrun: torchrun --nproc-per-node 2 -m openmoba bench parallel ..."
            )
        import torch
        from torch import distributed

        from openmoba.bench.machine import Machine
        from openmoba.bench.parallel.measure import PATIENCE, leave_at_once, run_parallel_benchmark
        from openmoba.parallel import leave_group, prioritize_transfers

        on_gpu = self.grid != "cpu"
        if on_gpu and not torch.cuda.is_available():
            raise ValueError(f"grid {self.grid!r} needs GPUs; use the grid 'cpu'")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        prioritize_transfers()
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
        try:
            rows = run_parallel_benchmark(GRIDS[self.grid], self.out, Machine(device, self.commit))
        except Exception:
            leave_at_once()
        if distributed.get_rank() == 0:
            print(markdown(rows))
        leave_group()
