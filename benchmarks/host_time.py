"""Host time of one attention call whose kernels do nothing: through the dispatcher, and around it.

    python benchmarks/host_time.py

writes results/cpu/host_time.csv: medians in microseconds of forward, and of forward and backward.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from openmoba.lab.provenance import provenance
from openmoba.ops import library

OUT = Path(__file__).parent.parent / "results" / "cpu" / "host_time.csv"
SETTINGS = (None, None, 16, 3, 0.25)  # no packed batch, block size, top-k, scale
ROUNDS, CALLS = 15, 400


def main() -> None:
    q, k, v = (torch.randn(1, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    paths: dict[str, Callable[[], Tensor]] = {
        "registered operation": lambda: torch.ops.openmoba.cpu_forward(q, k, v, *SETTINGS)[0],
        "around the dispatcher": lambda: library.attention("cpu", q, k, v, *SETTINGS),
    }
    d_out = torch.ones_like(q)
    rows = []
    with patch.object(library, "_module", lambda _: SimpleNamespace(forward=forward, backward=backward)):
        for name, attend in paths.items():

            def both(attend: Callable[[], Tensor] = attend) -> Any:
                return torch.autograd.grad(attend(), (q, k, v), d_out)

            rows.append({"path": name, "forward_us": microseconds(attend), "both_us": microseconds(both)})
    source = provenance()
    origin = {"cpu": source["hardware"]["cpu"], "torch": torch.__version__, "commit": source["commit"]}
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | origin for row in rows)
    print(OUT.read_text(), end="")


def forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What an implementation returns, undefined."""
    return torch.empty_like(q), torch.empty(q.shape[:-1]), torch.empty(10, dtype=torch.int32)


def backward(d_out: Tensor, *qkv: Any) -> tuple[Tensor, ...]:
    """The same of gradients."""
    return tuple(torch.empty_like(x) for x in qkv[:3])


def microseconds(call: Callable[[], Any]) -> float:
    """Median over rounds of the mean of many calls."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return round(median(times), 1)


if __name__ == "__main__":
    main()
