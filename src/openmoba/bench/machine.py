"""The machine a benchmark runs on: the columns that say so, its matrix rate, and how it talks and tidies up."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import openmoba
from openmoba.bench.rows import R, append_row
from openmoba.bench.timing import matrix_tflops
from openmoba.records.provenance import device_name, provenance


@dataclass
class Machine:
    """A device, and the commit that is recorded with what is measured on it.

    Attributes:
        commit: recorded instead of the checkout's; None for what git says.
        machine: the columns that say where a row comes from.
    """

    device: torch.device
    commit: str | None
    machine: dict[str, Any] = field(init=False)
    rates: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        source = provenance()
        on_gpu = self.device.type == "cuda"
        self.machine = {
            "device": device_name(self.device),
            "power_limit_w": _power_limit(self.device) if on_gpu else None,
            "torch": torch.__version__,
            "triton": source["versions"].get("triton"),
            "openmoba": openmoba.__version__,
            "commit": self.commit or source["commit"],
        }

    def matrix_tflops(self, dtype: str) -> float:
        """Measure the machine's matrix rate, once."""
        if dtype not in self.rates:
            self.rates[dtype] = matrix_tflops(getattr(torch, dtype), self.device)
        return self.rates[dtype]

    def tidy(self) -> None:
        """Give back the memory of what was measured, and of what a failure's frames held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # raises if a failure broke the device: nothing after it would be true
            torch.cuda.empty_cache()


def device_for(grid: str) -> torch.device:
    """Return what a grid is timed on: a GPU, but for the grid "cpu". ValueError: there is no GPU."""
    return torch.device("cpu") if grid == "cpu" else gpu_for(f"grid {grid!r}", "; use the grid 'cpu'")


def gpu_for(what: str, way_out: str = "") -> torch.device:
    """Return the GPU. ValueError: there is none for `what`."""
    if not torch.cuda.is_available():
        raise ValueError(f"{what} needs a GPU{way_out}")
    return torch.device("cuda")


def fill(
    out: Path,
    rows: list[R],
    tasks: Iterable[tuple[R, Callable[[], R]]],
    *,
    minutes: float | None,
    told: Callable[[R], str],
) -> list[R]:
    """Measure what a file does not hold yet, and append it there.

    Args:
        rows: those of `out`; what is measured is added.
        tasks: for each row asked for one that has its key, and the call that measures it.
        minutes: begin no measurement after this time; None for no limit.
        told: what is said of a row that was measured.

    Returns:
        The rows asked for, also those that were there, each once.
    """
    start = time.monotonic()
    done = {row.key: row for row in rows}
    wanted = {}
    for asked, measure in tasks:
        if asked.key not in done:
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                say(f"stopped after {minutes:g} minutes; the same command goes on from here")
                break
            row = done[asked.key] = measure()
            append_row(out, row)
            rows.append(row)
            say(told(row))
        wanted[asked.key] = done[asked.key]
    return list(wanted.values())


def attempted(row: R, measure: Callable[[R], R]) -> R:
    """Return a row as measured, with the time; a failure, out of memory included, is a row with an error."""
    row = replace(row, time=now())
    try:
        return measure(row)
    except Exception as error:  # whatever kind a contender or a compiler raises, other cases can still be timed
        return replace(row, error=failure(error))


def now() -> str:
    """Return a row's `time`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def failure(error: Exception) -> str:
    """Say what failed, as a row's `error`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def say(text: str) -> None:
    """Tell the user, apart from the table on the standard output."""
    print(text, file=sys.stderr, flush=True)


def _power_limit(device: torch.device) -> float | None:
    """Read the power limit in watts; None where the driver's tool does not say."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
