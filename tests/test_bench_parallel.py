"""The benchmark of one sequence over several devices: rows, comparison with one device, and what it needs."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import distributed

pytest.importorskip("transformers")

from ranks import checked

from openmoba.bench.__main__ import main as bench
from openmoba.bench.parallel.cases import GRIDS, ParallelRow, compared, markdown
from openmoba.bench.parallel.command import Parallel
from openmoba.bench.parallel.measure import peak_mb
from openmoba.bench.timing import Work
from openmoba.cli import main


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return checked("bench_parallel_checks.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ["together", "failing", "one failing"])
def test_two_processes_are_timed_together(outcomes: dict[str, list[str]], check: str) -> None:
    assert not outcomes[check], "\n".join(outcomes[check])


def test_the_grid_is_that_of_the_question() -> None:
    """256K and 1M, 32/8 heads, D 128, 128/8 and 4096/12, both passes and the forward, both ways; a step at 512K."""
    attention = [case for case in GRIDS["headline"] if case.kind == "attention"]
    assert {(case.tokens, case.block_size, case.top_k) for case in attention} == {
        (tokens, *setting) for tokens in (2**18, 2**20) for setting in ((128, 8), (4096, 12))
    }
    assert {(case.heads, case.kv_heads, case.head_dim) for case in attention} == {(32, 8, 128)}
    assert {(case.way, case.layout) for case in attention} >= {("heads", "contiguous"), ("keys", "head-tail")}
    assert len({case.on(1) for case in attention}) == 8
    (step,) = (case for case in GRIDS["headline"] if case.kind == "step")
    assert (step.size, step.full_layers, step.tokens) == ("545m", 3, 2**19)
    assert GRIDS["step-768K"][0].tokens == 768 * 2**10
    whole = {**dict.fromkeys(GRIDS["headline"])}
    assert list(whole)[: len(GRIDS["attention"])] == list(GRIDS["attention"])  # a run cut short has these
    assert {case.kind for case in GRIDS["smoke"]} == {"attention", "transfer", "step"}


def test_a_table_says_how_much_faster() -> None:
    case = GRIDS["cpu"][0]
    one = ParallelRow.of(case.on(1), 1, p50_ms=8.0, device="d", commit="c")
    two = ParallelRow.of(case, 2, p50_ms=5.0, device="d", commit="c")
    assert compared(two, [one]).speedup == 1.6
    assert compared(one, [one]).speedup is None
    assert compared(two, [replace(one, commit="other")]).speedup is None
    table = markdown([one, compared(two, [one])])
    assert "| forward+backward | 2 | heads contiguous | 512 | 32/2 | 5 | 1.60x |" in table


def test_memory_is_that_of_a_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing begins to count anew behind a call of seconds, of which there is no other."""
    now = {"forward": 0.0}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: now.update(forward=1e6))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: now["forward"])

    def forward() -> torch.Tensor:
        now["forward"] += 8e6
        return torch.ones(1)

    assert peak_mb(Work(forward), torch.device("cuda")) == 9.0


def test_transfers_go_first_before_there_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str | None] = []

    def make_group(*_: object, **__: object) -> None:
        read.append(os.environ.get("TORCH_NCCL_HIGH_PRIORITY"))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "environ", {"RANK": "0"})
    monkeypatch.setattr(distributed, "init_process_group", make_group)
    with pytest.raises(KeyboardInterrupt):
        Parallel(grid="cpu").run()
    assert read == ["1"]


def test_what_it_needs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "parallel", "--grid", "cpu"]) == 2
    assert "is started by torchrun" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="grid must be one of headline, attention, smoke, cpu"):
        bench(["parallel", "--grid", "none"])
