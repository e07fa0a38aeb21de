"""Benchmarks: what is timed, the rows, resuming, failures, figures. Nothing here asserts a speed."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import openmoba
from openmoba.bench import __main__ as module_main
from openmoba.bench import attention, cases, contenders, timing
from openmoba.bench.attention import run_benchmark
from openmoba.bench.cases import GRIDS, Case
from openmoba.bench.charts import speedup_chart, spread, time_chart
from openmoba.bench.flex import TILE, choice_mask, flex_call
from openmoba.bench.inputs import first_block_share, make_inputs
from openmoba.bench.rows import append_row, read_rows
from openmoba.bench.table import Row, compared, dense_names, markdown
from openmoba.cli import main
from openmoba.ops.reference import attention_mask

CPU = torch.device("cpu")
SMALL = Case(96, 16, 3, head_dim=8, heads=4, kv_heads=2, dtype="float32")
TINY_GRID = tuple(
    replace(SMALL, tokens=tokens, routing=routing, passes=passes)
    for tokens in (96, 160)
    for routing in cases.ROUTINGS
    for passes in cases.PASSES
)


pytestmark = pytest.mark.usefixtures("quick_timing")


def run(out: Path, grid: tuple[Case, ...] = TINY_GRID, **options: Any) -> list[Row]:
    return run_benchmark(grid, ("sdpa", "moba"), out, device=CPU, **options)


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


def test_contenders_that_cannot_run_here_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_benchmark((SMALL,), ("flex", "fa4"), tmp_path / "bench.csv", device=CPU) == []
    assert "left out: flex (runs on cuda)" in capsys.readouterr().err
    assert contenders.CONTENDERS["flash_moba"].missing(torch.device("cuda")) == "flash_moba is not installed"
    assert contenders.CONTENDERS["fa4"].missing(torch.device("cuda")) == "flash_attn.cute is not installed"


def test_quadratic_contenders_stop_at_256k_and_those_who_are_given_a_choice_come_last() -> None:
    long = replace(SMALL, tokens=2**20)
    tasks = list(attention._tasks([long, SMALL], ["sdpa", "moba", "given", "flex"]))
    first = [("moba", long), ("sdpa", SMALL), ("moba", SMALL)]
    assert tasks == [*first, ("given", long), ("given", SMALL), ("flex", SMALL)]


def test_given_blocks_are_timed_on_mobas_choice(tmp_path: Path) -> None:
    inputs = make_inputs(SMALL, CPU)
    selected = openmoba.moba_select(inputs.q, inputs.k, block_size=SMALL.block_size, top_k=SMALL.top_k)
    moba, given = (contenders.CONTENDERS[name].build(SMALL, inputs, selected)() for name in ("moba", "given"))
    torch.testing.assert_close(given, moba)
    (row,) = run_benchmark((SMALL,), ("given",), tmp_path / "bench.csv", device=CPU)
    assert row.error is None
    assert row.first_block_share is not None


def test_not_finite_results_are_no_measurement() -> None:
    with pytest.raises(ArithmeticError, match="NaN"):
        timing.measure(timing.Work(lambda: torch.tensor([0.0, torch.nan])), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="the system says how much memory a process takes")
def test_memory_on_a_cpu_is_that_of_each_pass() -> None:
    """2**22 floats are 16.8 MB: one tensor forward, and backward the gradient of the output's copy."""
    x = torch.zeros(2**22, requires_grad=True)
    found = timing.measure(timing.Work(lambda: 2 * x, (x,), torch.ones(2**22)), CPU)
    assert found.forward_mb == pytest.approx(16.8, abs=4)
    assert found.backward_mb == pytest.approx(16.8, abs=4)


def test_attention_with_mobas_mask_is_mobas() -> None:
    case = replace(SMALL, tokens=100)
    inputs = make_inputs(case, CPU)
    selected = openmoba.moba_select(inputs.q, inputs.k, block_size=case.block_size, top_k=case.top_k)
    masked, moba = (contenders.CONTENDERS[name].build(case, inputs, selected)() for name in ("sdpa_mask", "moba"))
    torch.testing.assert_close(masked, moba, rtol=1e-4, atol=1e-5)


def test_collecting_garbage_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too: it happens before the first timed call, which decides how many there are."""
    monkeypatch.setattr(timing.gc, "collect", lambda: time.sleep(0.3))
    monkeypatch.setattr(timing, "SECONDS", 0.05)
    monkeypatch.setattr(timing, "_event_times", timing._wall_times)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    for device in (CPU, torch.device("cuda")):
        found = timing.measure(timing.Work(lambda: torch.zeros(3)), device)
        assert found.samples > timing.FEWEST
        assert found.p80_ms < 100


def test_gradients_are_part_of_the_timed_call() -> None:
    x = torch.ones(3, requires_grad=True)
    phases: list[str] = []
    results = timing.Work(lambda: 2 * x, (x,), torch.full((3,), 5.0)).run(lambda: phases.append("forward done"))
    assert [result.tolist() for result in results] == [[2.0] * 3, [10.0] * 3]
    assert phases == ["forward done"]
    (out,) = timing.Work(lambda: 2 * x).run()
    assert not out.requires_grad


def test_operations_are_those_of_the_pairs_in_the_mask() -> None:
    inputs = make_inputs(replace(SMALL, heads=1, kv_heads=1), CPU)
    selected = openmoba.moba_select(inputs.q, inputs.k, block_size=16, top_k=3)
    pairs = int(attention_mask(selected, 96, 16).sum())
    case = replace(SMALL, heads=1, kv_heads=1)
    assert case.operations(dense=False, scores=False) == 14 * pairs * 8
    assert replace(case, passes="forward").operations(dense=False, scores=False) == 4 * pairs * 8
    assert case.operations(dense=True, scores=False) == 14 * (96 * 97 // 2) * 8
    scores = 16 * (3 + 4 + 5)
    assert case.operations(dense=False, scores=True) == (14 * pairs + 2 * scores) * 8


@pytest.mark.parametrize("width", [64, 128])
def test_skewed_routing_draws_half_of_the_queries_to_one_block(width: int) -> None:
    case = Case(4096, 32, 3, head_dim=width, heads=2, kv_heads=1, dtype="float32", passes="forward")
    share = {}
    for routing in cases.ROUTINGS:
        inputs = make_inputs(replace(case, routing=routing), CPU)
        share[routing] = first_block_share(openmoba.moba_select(inputs.q, inputs.k, block_size=32, top_k=3))
    assert share["random"] < 0.15
    assert 0.5 < share["skewed"] < 0.6


def test_mask_given_to_flex_attention_is_the_choice() -> None:
    case = Case(5 * TILE, 2 * TILE, 2, head_dim=8, batch=2, heads=2, kv_heads=1, dtype="float32", passes="forward")
    inputs = make_inputs(case, CPU)
    random_BTHR = openmoba.moba_select(inputs.q, inputs.k, block_size=case.block_size, top_k=case.top_k)
    first_BTHR = random_BTHR.clamp(max=0)  # all choose block 0, so that tiles stay unread
    for selected_BTHR in (random_BTHR, first_BTHR):
        mask = choice_mask(case, selected_BTHR)
        reads_BHTT = attention_mask(selected_BTHR, case.tokens, case.block_size)
        assert torch.equal(create_mask(mask.mask_mod, 2, 2, case.tokens, case.tokens, device="cpu"), reads_BHTT)
        read_tiles_BHQN = reads_BHTT.view(2, 2, 5, TILE, 5, TILE).any(5).any(3)
        assert torch.equal(mask.to_dense().bool(), read_tiles_BHQN)
    assert read_tiles_BHQN[0, 0, 4].tolist() == [True, True, False, False, True]


def test_flex_attention_reads_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4 * TILE, TILE, 2, head_dim=16, batch=2, heads=4, kv_heads=2, dtype="float32", passes="forward")
    inputs = make_inputs(case, CPU)
    settings = {"block_size": case.block_size, "top_k": case.top_k}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    out = flex_call(case, inputs, openmoba.moba_select(inputs.q, inputs.k, **settings))()
    expected = openmoba.moba_attention(inputs.q, inputs.k, inputs.v, **settings, impl="reference")
    torch.testing.assert_close(out, expected)


def test_flex_attention_needs_whole_tiles() -> None:
    with pytest.raises(ValueError, match="block_size=16 is not a multiple"):
        choice_mask(replace(SMALL, tokens=TILE), torch.zeros(1, TILE, 4, 2, dtype=torch.int32))


def test_figures_and_table_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.csv"
    rows = run(out)
    assert main(["bench", "plot", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench.csv", "bench-time.png", "bench-time.svg", "bench-speedup.png", "bench-speedup.svg",
    }  # fmt: skip
    assert "| 8 | 16/3 | 96 | forward | random |" in capsys.readouterr().out
    forward = time_chart(rows).axes[0]
    assert {line.get_label(): list(line.get_xdata()) for line in forward.lines} == {
        "openmoba 16/3": [96, 160],
        "SDPA": [96, 160],
    }
    (curve, _) = speedup_chart(rows).axes[0].lines
    both = [row for row in rows if (row.passes, row.routing) == ("forward+backward", "random")]
    assert list(curve.get_ydata()) == [row.speedup for row in both if row.contender == "moba"]


def dense_and_moba(head_dim: int, tokens: int, commit: str = "c", **times: float) -> list[Row]:
    """A row of each contender, of both passes; MoBA's with three settings."""
    case = replace(SMALL, head_dim=head_dim, tokens=tokens, passes="forward+backward")
    origin = {"commit": commit, "device": "card", "torch": "2"}
    settings = [replace(case, block_size=block) for block in (16, 32, 64)]
    moba = [Row.of("moba", case, p50_ms=1.0 + i / 50, **origin) for i, case in enumerate(settings)]
    return [*(Row.of(name, case, p50_ms=ms, **origin) for name, ms in times.items()), *moba]


def test_speedup_figure_is_one_panel_whose_lines_are_named_and_differ() -> None:
    rows = [
        row
        for width in (64, 128)
        for tokens, ms in ((1024, 2.0), (2048, 8.0))
        for row in dense_and_moba(width, tokens, sdpa_cudnn=ms, sdpa_flash=2 * ms)
    ]
    (axes,) = speedup_chart(rows).axes
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3
    assert [text.get_text() for text in axes.texts] == ["openmoba 64/3", "openmoba 32/3", "openmoba 16/3"]
    heights = [text.xy[1] for text in axes.texts]
    low, high = axes.get_ylim()
    assert all(b / a > (high / low) ** 0.05 for a, b in pairwise(heights))
    assert "(SDPA/cuDNN)" in axes.get_ylabel()
    assert "head width 128" in axes.get_title()


def test_labels_are_spread_around_where_they_belong() -> None:
    assert list(spread([1.0, 10.0, 100.0], 2.0)) == [1.0, 10.0, 100.0]
    assert list(spread([10.0, 10.0], 4.0)) == pytest.approx([5.0, 20.0])
    middle = (5.0 * 10.0 * 10.0) ** (1 / 3)
    assert list(spread([5.0, 10.0, 10.0], 2.0)) == pytest.approx([middle / 2, middle, middle * 2])


def test_rows_are_compared_with_dense_attention_that_was_timed_later() -> None:
    """As fast as any of the same shape, device and torch, whatever our commit; the last row of each contender."""
    rows = dense_and_moba(64, 1024, "old", sdpa_cudnn=5.0)
    later = dense_and_moba(64, 1024, "new", sdpa_cudnn=4.0, fa4=3.0)
    other = [replace(row, torch="3", p50_ms=0.5) for row in later] + dense_and_moba(128, 1024, sdpa_flash=0.1)
    moba = rows[-1]
    assert compared(moba, rows).dense_ms == 5.0
    assert compared(moba, [*rows, *later, *other]).dense_ms == 3.0
    assert compared(moba, [*rows, *later]).speedup == pytest.approx(3.0 / moba.p50_ms, rel=1e-5)
    assert compared(rows[0], rows).dense_ms is None
    assert compared(replace(moba, dense_ms=9.0, speedup=9.0), []).speedup is None
    assert dense_names([moba], [*rows, *later]) == ["fa4"]
    assert contenders.contender_label("sdpa_efficient_grouped") == "SDPA/memory-efficient with grouped queries"


def test_flash_attention_4_is_called_as_its_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flash_attn.cute.flash_attn_func(q, k, v, causal=...)` of `[batch, tokens, heads, width]`, heads grouped."""

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    module = ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    inputs = make_inputs(SMALL, CPU)
    found, expected = (contenders.CONTENDERS[name].build(SMALL, inputs, None)() for name in ("fa4", "sdpa"))
    torch.testing.assert_close(found, expected)


def test_figures_show_the_newest_row_of_each_case_and_the_usual_heads() -> None:
    def row(commit: str, heads: int, tokens: int, milliseconds: float) -> Row:
        case = replace(SMALL, heads=heads, tokens=tokens, passes="forward")
        return Row.of("moba", case, commit=commit, p50_ms=milliseconds)

    rows = [row("old", 4, 1024, 1.0), row("old", 4, 2048, 9.0), row("new", 4, 2048, 2.0), row("new", 2, 8192, 8.0)]
    other_width = replace(rows[0], head_dim=64)
    (axes,) = time_chart([*rows, other_width]).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [1024, 2048]
    assert list(line.get_ydata()) == [1.0, 2.0]


def test_every_contender_has_a_line_of_its_own() -> None:
    case = replace(SMALL, passes="forward")
    rows = [
        Row.of(name, replace(case, tokens=tokens), p50_ms=1.0) for name in contenders.CONTENDERS for tokens in (96, 160)
    ]
    (axes,) = time_chart(rows).axes
    assert len(axes.lines) == len(contenders.CONTENDERS)
    both_dense = {"sdpa", "sdpa_cudnn"}  # one is a CPU's, the other a GPU's
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == len(axes.lines) - len(both_dense) + 1


def test_plot_refuses_what_is_no_benchmark(tmp_path: Path) -> None:
    assert main(["bench", "plot", str(tmp_path / "none.csv")]) == 2
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        read_rows(other, Row)
    with pytest.raises(ValueError, match="no row to draw"):
        speedup_chart([Row.of("moba", SMALL, error="out of memory")])


def test_charts_name_the_lengths_that_there_is_room_for() -> None:
    def names(lengths: list[int]) -> list[str]:
        rows = [Row.of("moba", replace(SMALL, tokens=tokens), p50_ms=1.0) for tokens in lengths]
        return [label.get_text() for label in time_chart(rows).axes[0].get_xticklabels()]

    assert names([8192, 32768, 65536]) == ["8K", "32K", "64K"]
    many = names([2**i for i in range(8, 21)])
    assert len(many) == 13
    assert [name for name in many if name] == ["256", "1K", "4K", "16K", "64K", "256K", "1M"]


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


def test_timing_needs_torch_alone() -> None:
    absent = ("tyro", "matplotlib", "transformers", "datasets", "tokenizers", "accelerate")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import openmoba.bench.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_survive_text_with_commas_and_line_ends(tmp_path: Path) -> None:
    row = Row.of("moba", SMALL, error='RuntimeError: "a", b', p50_ms=1.5, samples=3)
    append_row(tmp_path / "rows.csv", row)
    assert read_rows(tmp_path / "rows.csv", Row) == [row]
