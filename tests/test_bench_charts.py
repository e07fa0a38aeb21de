"""Figures and tables of the attention benchmark."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from bench_rows import SMALL, run

from openmoba.bench import contenders
from openmoba.bench.charts import speedup_chart, spread, time_chart
from openmoba.bench.figures import draw
from openmoba.bench.rows import read_rows
from openmoba.bench.table import Row, compared, dense_names
from openmoba.cli import main

RESULTS = Path(__file__).parent.parent / "results"
DRAWN = [csv for csv in sorted(RESULTS.glob("*/*.csv")) if any(csv.parent.glob(f"{csv.stem}*.svg"))]

pytestmark = pytest.mark.usefixtures("quick_timing")


def dense_and_moba(head_dim: int, tokens: int, commit: str = "c", **times: float) -> list[Row]:
    """A row of each contender, of both passes; MoBA's with three settings."""
    case = replace(SMALL, head_dim=head_dim, tokens=tokens, passes="forward+backward")
    origin = {"commit": commit, "device": "card", "torch": "2"}
    settings = [replace(case, block_size=block) for block in (16, 32, 64)]
    moba = [Row.of("moba", case, p50_ms=1.0 + i / 50, **origin) for i, case in enumerate(settings)]
    return [*(Row.of(name, case, p50_ms=ms, **origin) for name, ms in times.items()), *moba]


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


@pytest.mark.parametrize("csv", DRAWN, ids=lambda csv: f"{csv.parent.name}/{csv.stem}")
def test_committed_figures_show_the_rows_that_lie_beside_them(csv: Path, tmp_path: Path) -> None:
    """To the byte, where the same matplotlib draws; one of two GPUs once showed rows of another commit."""
    files, _ = draw(csv, tmp_path)
    drawn_by = re.compile("Matplotlib v[0-9.]+")
    for file in files:
        committed = csv.with_name(file.name)
        assert committed.exists(), f"openmoba bench plot {csv.relative_to(RESULTS.parent)}"
        if file.suffix == ".svg" and drawn_by.findall(committed.read_text()) == drawn_by.findall(file.read_text()):
            assert committed.read_text() == file.read_text(), f"openmoba bench plot {csv.relative_to(RESULTS.parent)}"


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
