"""The attention benchmark: rows, resuming, failures. Nothing here asserts a speed."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import SMALL, run

from openmoba.bench import __main__ as module_main
from openmoba.bench import attention, contenders, timing
from openmoba.bench.cases import GRIDS
from openmoba.bench.rows import append_row, read_rows
from openmoba.bench.table import Row, markdown
from openmoba.cli import main

pytestmark = pytest.mark.usefixtures("quick_timing")


def refuse(*_: Any) -> Any:
    raise AssertionError("measured again")


def test_every_case_is_a_row_and_dense_attention_is_timed_once_per_shape(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.csv"
    rows = run(out)
    assert read_rows(out, Row) == list(dict.fromkeys(rows))
    with out.open() as file:
        head = next(csv.reader(file))
    assert sorted(head) == sorted(field.name for field in fields(Row))
    assert head.index("contender") == 0
    assert head[-1] == "time"
    dense = {row.shape: row for row in rows if row.contender == "sdpa"}
    moba = [row for row in rows if row.contender == "moba"]
    assert (len(dense), len(moba), len(rows)) == (4, 8, 12)
    for row in moba:
        assert (row.error, row.samples, row.path) == (None, timing.FEWEST, "cpu blocks")
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.dense_ms == dense[row.shape].p50_ms
        assert row.speedup == pytest.approx(row.dense_ms / row.p50_ms, rel=1e-4)
    assert all(row.block_size is None and row.routing is None and row.speedup is None for row in dense.values())


def test_a_file_keeps_the_order_of_its_columns(tmp_path: Path) -> None:
    """Files from before all kinds of rows shared their last columns have these elsewhere."""
    new, old = tmp_path / "new.csv", tmp_path / "old.csv"
    row = Row.of("moba", SMALL, p50_ms=1.5, device="card", error="none")
    append_row(new, row)
    with new.open() as file, old.open("w", newline="") as other:
        cells = dict(next(csv.DictReader(file)))
        writer = csv.DictWriter(other, names := sorted(cells), lineterminator="\n")
        writer.writeheader()
        writer.writerow(cells)
    append_row(old, replace(row, tokens=7))
    assert read_rows(old, Row) == [row, replace(row, tokens=7)]
    assert old.read_text().splitlines()[0] == ",".join(names)
    assert len(old.read_text().splitlines()) == 3


def test_rows_of_the_same_commit_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bench.csv"
    first = run(out)
    monkeypatch.setattr(attention, "measure_row", refuse)
    assert run(out) == first
    with pytest.raises(AssertionError, match="measured again"):
        run(out, commit="another")


def test_time_limit_stops_between_measurements_and_a_torn_row_is_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    assert run(out, minutes=0) == []
    complete = run(out)
    whole = out.read_text()
    out.write_text(whole[: whole.rfind("\n", 0, -1) + 40])
    assert len(read_rows(out, Row)) == len(complete) - 1
    again = run(out)
    assert [row.key for row in again] == [row.key for row in complete]
    assert read_rows(out, Row) == again


def test_failure_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> Any:
        def call() -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 60 GiB")

        return call

    monkeypatch.setitem(contenders.CONTENDERS, "sdpa", replace(contenders.CONTENDERS["sdpa"], build=exhausted))
    dense, moba = run(tmp_path / "bench.csv", (SMALL,))
    assert dense.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 60 GiB"
    assert dense.p50_ms is None
    assert (moba.error, moba.speedup) == (None, None)
    assert "out of memory" in markdown([replace(moba, error=dense.error)])


def test_both_commands_read_the_same_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GRIDS, "cpu", (SMALL,))
    options = ["--grid", "cpu", "--contenders", "sdpa", "moba", "--minutes", "5"]
    module_main.main([*options, "--out", str(tmp_path / "module.csv")])
    assert main(["bench", "attention", *options, "--out", str(tmp_path / "command.csv")]) == 0
    assert [row.key for row in read_rows(tmp_path / "module.csv", Row)] == [
        row.key for row in read_rows(tmp_path / "command.csv", Row)
    ]
    assert "| 8 | 16/3 | 96 |" in capsys.readouterr().out
    assert main(["bench", "attention", "--grid", "none"]) == 2
    assert main(["bench", "attention", "--grid", "cpu", "--contenders", "none"]) == 2


def test_short_grid_has_both_paths_at_every_length_from_512_on() -> None:
    dense = {(case.tokens, case.tokens <= case.block_size * case.top_k) for case in GRIDS["short"]}
    assert dense == {(256, True)} | {(tokens, path) for tokens in (512, 1024, 2048, 4096) for path in (True, False)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_grids_of_a_gpu_are_refused_without_one() -> None:
    with pytest.raises(SystemExit, match="use the grid 'cpu'"):
        module_main.main(["--grid", "headline"])


def test_rows_survive_text_with_commas_and_line_ends(tmp_path: Path) -> None:
    row = Row.of("moba", SMALL, error='RuntimeError: "a", b', p50_ms=1.5, samples=3)
    append_row(tmp_path / "rows.csv", row)
    assert read_rows(tmp_path / "rows.csv", Row) == [row]
