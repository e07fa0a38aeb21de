"""Shared inputs of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read when a kernel module is imported, which is never before an operation first runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def own_recompile_limit() -> Iterator[None]:
    """Take back what a test does to the compiler's limit: transformers' `generate` raises it for the process."""
    before = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = before


@pytest.fixture(params=["placed", "sorted"])
def planning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to make lists, whatever the number of pairs."""
    monkeypatch.setattr("openmoba.ops.triton.plan._MOST_LOOKS", 2**40 if request.param == "placed" else 0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Poisoned memory for a test."""
    from attending import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few timed calls as there can be, and no collection of everything that the tests have imported: slow."""
    monkeypatch.setattr("openmoba.bench.timing.SECONDS", 0.0)
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@contextmanager
def _few_replicates() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("study.fit", "measure.resample"):
            patch.setattr(f"openmoba.lab.{module}.REPLICATES", 300)
        yield


@pytest.fixture(scope="module")
def few_replicates() -> Iterator[None]:
    """Replicates enough to tell a resolved difference from noise."""
    with _few_replicates():
        yield


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with its report, by few replicates; not to be changed."""
    from synthetic_study import make_study

    from openmoba.lab.study.report import write_report

    out = tmp_path_factory.mktemp("study")
    with _few_replicates():
        write_report(make_study(out), out, "6nd")
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures are made but not written, which takes most of the time."""
    monkeypatch.setattr("openmoba.lab.study.charts.save", lambda _, path: [path.with_name(f"{path.name}.png")])


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    """Standard normal tensors of a fixed stream, in float64 unless told."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return make
