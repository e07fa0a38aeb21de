"""Small cases of the attention benchmark, and its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openmoba.bench import cases
from openmoba.bench.attention import run_benchmark
from openmoba.bench.cases import Case
from openmoba.bench.table import Row

CPU = torch.device("cpu")
SMALL = Case(96, 16, 3, head_dim=8, heads=4, kv_heads=2, dtype="float32")
TINY_GRID = tuple(
    replace(SMALL, tokens=tokens, routing=routing, passes=passes)
    for tokens in (96, 160)
    for routing in cases.ROUTINGS
    for passes in cases.PASSES
)


def run(out: Path, grid: tuple[Case, ...] = TINY_GRID, **options: Any) -> list[Row]:
    return run_benchmark(grid, ("sdpa", "moba"), out, device=CPU, **options)
