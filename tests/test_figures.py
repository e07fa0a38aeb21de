"""The charts show what the specification says: lines, dashes, colours, axes, error bars; same input, same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from openmoba.lab.figures import (
    AXES,
    BLUE,
    GREY,
    RED,
    Curve,
    Level,
    PositionRange,
    arm_styles,
    layers_chart,
    position_chart,
    save,
    scaling_chart,
)
from openmoba.lab.fit import Interval, fit_runs
from openmoba.lab.needle import Cell, write_needle

HYBRID = {"1": Level(1.170, Interval(1.165, 1.176)), "3": Level(1.128), "5": Level(1.102), "10": Level(1.087)}


def chart_a() -> Figure:
    return layers_chart(
        HYBRID, Level(1.085), Level(1.170, Interval(1.16, 1.18)),
        title="t", layers_name="Full layers", loss_name="Trailing loss, last 2K",
    )  # fmt: skip


def chart_b(axis: str = "6nd") -> Figure:
    compute = np.array([0.1, 0.5, 2.0])
    fits = {
        "MoBA": fit_runs(compute, (1.546 * compute**-0.108)[:, None]),
        "Full attention": fit_runs(compute, (1.464 * compute**-0.097)[:, None]),
    }
    curves = [
        Curve(arm, f"{n}M parameters", [c / 4, c / 2, c], [2 * loss, 1.3 * loss, loss])
        for arm, law in fits.items()
        for n, c, loss in zip((1, 2, 3), compute, law.law(compute), strict=True)
    ]
    return scaling_chart(curves, fits, title="t", loss_name="Trailing loss, length 32,768, last 2,048", axis=axis)


def test_chart_a_has_hybrid_dashed_blue_with_markers_between_two_solid_horizontal_lines() -> None:
    axes = chart_a().axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    container = axes.containers[0]
    hybrid = container.lines[0]
    assert container.get_label() == "Layer-wise hybrid"
    assert (to_hex(hybrid.get_color()), hybrid.get_linestyle(), hybrid.get_marker()) == (BLUE.lower(), "--", "o")
    for name, colour, loss in (("Full attention", RED, 1.085), ("MoBA", GREY, 1.170)):
        assert (to_hex(lines[name].get_color()), lines[name].get_linestyle()) == (colour.lower(), "-")
        assert list(lines[name].get_ydata()) == [loss, loss]


def test_chart_a_shows_full_layers_as_categories_in_the_order_given() -> None:
    axes = chart_a().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "5", "10"]
    hybrid = axes.containers[0].lines[0]
    np.testing.assert_array_equal(hybrid.get_xdata(), range(4))
    np.testing.assert_array_equal(hybrid.get_ydata(), [1.170, 1.128, 1.102, 1.087])
    assert axes.get_yscale() == "linear"


def test_chart_a_error_bars_are_the_intervals() -> None:
    bars = chart_a().axes[0].containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bars[0][:, 1], [1.165, 1.176])
    np.testing.assert_allclose(bars[1][:, 1], [1.128, 1.128])


@pytest.mark.parametrize("axis", AXES)
def test_chart_b_is_log_log_with_solid_curves_and_dashed_laws(axis: str) -> None:
    axes = chart_b(axis).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == AXES[axis]
    assert "last 2,048" in axes.get_ylabel()
    for colour, a, b in ((BLUE, 1.546, -0.108), (RED, 1.464, -0.097)):
        own = [line for line in axes.get_lines() if to_hex(line.get_color()) == colour.lower()]
        curves = [line for line in own if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
        assert len(curves) == 3, "a solid curve per size"
        (law,) = [line for line in own if line.get_linestyle() == "--"]
        np.testing.assert_allclose(law.get_ydata(), a * law.get_xdata() ** b, rtol=1e-6)
        for curve in curves:
            end = curve.get_xdata()[-1], curve.get_ydata()[-1]
            assert end[1] == pytest.approx(a * end[0] ** b), "the law runs through the end points"
    assert {text.get_text() for text in axes.texts} == {"1M parameters", "2M parameters", "3M parameters"}


def test_position_chart_shows_the_difference_from_full_attention() -> None:
    def ranges(*losses: float) -> list[PositionRange]:
        return [PositionRange(128 * i, 128 * (i + 1), Level(loss)) for i, loss in enumerate(losses)]

    figure = position_chart(
        {"Full attention": ranges(3.0, 2.5), "MoBA": ranges(3.1, 2.7)}, "Full attention", title="t", loss_name="l"
    )
    lower = figure.axes[1]
    np.testing.assert_allclose(lower.get_lines()[1].get_ydata(), [0.1, 0.2])
    assert list(lower.get_xticks()) == [0, 128, 256]


def test_arms_differ_in_colour_and_in_marker() -> None:
    styles = list(arm_styles(["MoBA", "Full attention", "last-1", "last-2", "last-3", "time"]).values())
    assert len({colour for colour, _, _ in styles}) == len({marker for _, _, marker in styles}) == 6


def test_charts_are_saved_as_png_and_svg_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = save(chart_a(), tmp_path / "one" / "chart")
    second = save(chart_a(), tmp_path / "two" / "chart")
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_dots_in_a_name_are_kept(tmp_path: Path) -> None:
    files = [*save(chart_a(), tmp_path / "v1.0-scaling-law"), *save(chart_a(), tmp_path / "v1.0-positions")]
    assert [path.name for path in files] == [
        "v1.0-scaling-law.png", "v1.0-scaling-law.svg", "v1.0-positions.png", "v1.0-positions.svg",
    ]  # fmt: skip


def test_a_needle_grid_keeps_the_dots_of_its_name(tmp_path: Path) -> None:
    files = write_needle([Cell(128, 0.0, 2, 0.5, 1.0)], tmp_path / "ndl-3.1", title="t")
    assert [path.name for path in files] == ["ndl-3.1.csv", "ndl-3.1.png", "ndl-3.1.svg"]
    assert all(path.exists() for path in files)
