"""The charts show what the specification says: lines, dashes, colours, axes, error bars; same input, same bytes."""

from __future__ import annotations

import errno
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import Interval
from openmoba.lab.study.figures import Curve, Level, layers_chart, scaling_chart
from openmoba.lab.study.fit import fit_arms
from openmoba.lab.study.panels import Candidate, candidates_chart, position_chart
from openmoba.records.figures import BLUE, DENSE, GREY, RED, Look, save

HYBRID = {
    "1 layer": Level(1.170, Interval(1.165, 1.176)),
    "3 layers": Level(1.128),
    "5 layers": Level(1.102),
    "10 layers": Level(1.087),
}
COMPUTE = np.array([0.1, 0.5, 2.0])
LOOKS = {"Full attention": DENSE, "MoBA": Look(BLUE, "o"), "last-1": Look("#EE7733", "^", "--")}


def chart_a() -> Figure:
    return layers_chart(
        HYBRID, 1.085, Level(1.170, Interval(1.16, 1.18)), {"3 layers": Level(1.128, Interval(1.12, 1.14))},
        title="t", layers_name="Full layers", loss_name="Trailing loss, last 2K",
    )  # fmt: skip


def chart_b(axis: str = "6nd", scale: float = 1.0, fitted: Collection[str] = ()) -> Figure:
    compute = COMPUTE * scale
    moba, full = fit_arms(
        [compute, compute],
        [(1.546 * COMPUTE**-0.108)[:, None], (1.464 * COMPUTE**-0.097)[:, None]],
        [0],
    )
    curves = [
        Curve(arm, f"{n} M parameters", [c / 40, c / 4, c], [9.0, 1.3 * loss, loss])
        for arm, law in (("MoBA", moba), ("Full attention", full))
        for n, c, loss in zip((1, 2, 3), compute, law.law(compute), strict=True)
    ]
    laws, differences = {"MoBA": moba, "Full attention": full}, {"MoBA": (moba, full)}
    name = "Trailing loss, length 32,768, last 2,048"
    return scaling_chart(
        curves, laws, differences, LOOKS, fitted=fitted or {curve.size for curve in curves},
        reference="Full attention", title="t", loss_name=name, axis=AXES[axis],
    )  # fmt: skip


def drawn(figure: Figure) -> list[Axes]:
    """The figure's panels after drawing, when ticks and labels have their places."""
    FigureCanvasAgg(figure).draw()
    return figure.axes


def tick_labels(axes: Axes, which: str) -> list[Text]:
    ticks = getattr(axes, f"{which}axis")
    low, high = sorted(ticks.get_view_interval())
    return [
        tick.label1
        for tick in [*ticks.get_major_ticks(), *ticks.get_minor_ticks()]
        if tick.label1.get_text() and low <= tick.get_loc() <= high
    ]


def test_chart_a_has_hybrid_dashed_blue_with_markers_between_two_solid_horizontal_lines() -> None:
    axes = chart_a().axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    hybrid = lines["Layer-wise Hybrid"]
    assert (to_hex(hybrid.get_color()), hybrid.get_linestyle(), hybrid.get_marker()) == (BLUE.lower(), "--", "o")
    for name, colour, loss in (("Full Attention", RED, 1.085), ("MoBA", GREY, 1.170)):
        assert (to_hex(lines[name].get_color()), lines[name].get_linestyle()) == (colour.lower(), "-")
        assert list(lines[name].get_ydata()) == [loss, loss]


def test_chart_a_shows_full_layers_as_categories_in_the_order_given() -> None:
    axes = chart_a().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 layer", "3 layers", "5 layers", "10 layers"]
    hybrid = next(line for line in axes.get_lines() if line.get_label() == "Layer-wise Hybrid")
    np.testing.assert_array_equal(hybrid.get_xdata(), range(4))
    np.testing.assert_array_equal(hybrid.get_ydata(), [1.170, 1.128, 1.102, 1.087])
    assert axes.get_yscale() == "linear"


def test_chart_a_has_a_bar_for_every_difference_and_no_band() -> None:
    """A band around one line would cover the other arms."""
    axes = chart_a().axes[0]
    full, moba = axes.containers
    bars = [[segment.tolist() for segment in container.lines[2][0].get_segments()] for container in (full, moba)]
    (hybrid, line), (other,) = bars
    np.testing.assert_allclose([end[1] for end in hybrid], [1.165, 1.176])
    np.testing.assert_allclose([end[1] for end in line], [1.16, 1.18])
    np.testing.assert_allclose([end[1] for end in other], [1.12, 1.14])
    assert hybrid[0][0] < 0, "beside the hybrid"
    assert 1 < other[0][0] < 1.5, "on its other side"
    assert line[0][0] > 3, "right of the last hybrid"
    assert not axes.patches


def test_chart_a_colours_a_bar_like_the_line_it_is_read_against() -> None:
    """A bar of the difference from full attention that crosses MoBA's line says nothing of MoBA."""
    axes = chart_a().axes[0]
    colours = {container.get_label(): to_hex(container.lines[2][0].get_color()[0]) for container in axes.containers}
    assert colours == {
        "95% of the difference from full attention": RED.lower(),
        "95% of the difference from MoBA": GREY.lower(),
    }


@pytest.mark.parametrize("axis", AXES)
def test_chart_b_is_log_log_with_solid_curves_and_dashed_laws(axis: str) -> None:
    axes = chart_b(axis).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == f"{AXES[axis].caption} ({AXES[axis].unit})"
    assert "last 2,048" in axes.get_ylabel()
    for colour, a, b in ((BLUE, 1.546, -0.108), (RED, 1.464, -0.097)):
        own = [line for line in axes.get_lines() if to_hex(line.get_color()) == colour.lower()]
        curves = [line for line in own if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
        assert len(curves) == 3, "a solid curve per size"
        (law,) = [line for line in own if line.get_linestyle() == "--"]
        np.testing.assert_allclose(law.get_ydata(), a * law.get_xdata() ** b, rtol=1e-6)
        assert law.get_xdata()[0] <= COMPUTE[0] / 2, "the law reaches beyond both ends"
        assert law.get_xdata()[-1] >= COMPUTE[-1] * 2
        for curve in curves:
            end = curve.get_xdata()[-1], curve.get_ydata()[-1]
            assert end[1] == pytest.approx(a * end[0] ** b), "the law runs through the end points"
    assert {text.get_text() for text in axes.texts} == {"1 M parameters", "2 M parameters", "3 M parameters"}


def test_chart_b_has_the_band_of_the_difference_around_moba_alone() -> None:
    axes = chart_b().axes[0]
    (band,) = axes.collections
    assert sum(line.get_alpha() == 0.6 for line in axes.get_lines()) == 2, "its edges"
    assert to_hex(band.get_facecolor()[0]) == BLUE.lower()
    compute, loss = band.get_paths()[0].vertices.T
    np.testing.assert_allclose(loss, 1.546 * compute**-0.108, rtol=1e-6, err_msg="exact laws have no band")


def test_laws_reach_beyond_their_own_runs_and_bands_stand_where_both_are_drawn() -> None:
    """Sparse arms cost less: a law is not drawn through compute that its runs are far from."""
    compute = [COMPUTE / 20, COMPUTE]
    losses = [(1.5 * (c / c[-1]) ** -0.1)[:, None] + np.array([0.0, 0.01]) for c in compute]
    moba, full = fit_arms(compute, losses, [0, 1])
    curves = [
        Curve(arm, f"{n} M", [c / 4, c], [loss.mean() * 2, loss.mean()])
        for arm, amounts, rows in zip(("MoBA", "Full attention"), compute, losses, strict=True)
        for n, c, loss in zip((1, 2, 3), amounts, rows, strict=True)
    ]
    laws = {"MoBA": moba, "Full attention": full}
    figure = scaling_chart(
        curves, laws, {"MoBA": (moba, full)}, LOOKS, fitted={"1 M", "2 M", "3 M"}, reference="Full attention",
        title="t", loss_name="l", axis=AXES["6nd"],
    )  # fmt: skip
    axes = figure.axes[0]
    drawn_laws = {
        line.get_color().lower(): line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "--"
    }
    for colour, amounts in ((BLUE, compute[0]), (RED, compute[1])):
        law = drawn_laws[colour.lower()]
        assert amounts[0] / 3 < law[0] <= amounts[0] / 2
        assert amounts[-1] * 2 <= law[-1] < amounts[-1] * 3
    (band,) = axes.collections
    reach = band.get_paths()[0].vertices[:, 0]
    assert reach.min() == pytest.approx(drawn_laws[RED.lower()][0])
    assert reach.max() == pytest.approx(drawn_laws[BLUE.lower()][-1])
    assert sorted((text.xy[0], text.get_text(), to_hex(text.get_color())) for text in axes.texts) == sorted(
        (c, f"{n} M", colour.lower())
        for colour, amounts in ((BLUE, compute[0]), (RED, compute[1]))
        for n, c in zip((1, 2, 3), amounts, strict=True)
    ), "each arm's ends have their names where they lie apart"


def test_the_band_lies_on_the_drawn_law_of_the_reference() -> None:
    """Over the seeds that both arms have its law may be another than the one that is drawn, over all."""
    moba, full = fit_arms([COMPUTE] * 2, [(1.6 * COMPUTE**-0.1)[:, None], (1.5 * COMPUTE**-0.1)[:, None]], [0])
    (drawn_full,) = fit_arms([COMPUTE], [(1.4 * COMPUTE**-0.1)[:, None]], [0])
    curves = [Curve("MoBA", "1 M", [1.0, 2.0], [3.0, 1.5]), Curve("Full attention", "1 M", [1.0, 2.0], [3.0, 1.4])]
    figure = scaling_chart(
        curves, {"MoBA": moba, "Full attention": drawn_full}, {"MoBA": (moba, full)}, LOOKS,
        fitted={"1 M"}, reference="Full attention", title="t", loss_name="l", axis=AXES["6nd"],
    )  # fmt: skip
    compute, loss = figure.axes[0].collections[0].get_paths()[0].vertices.T
    np.testing.assert_allclose(loss, 1.4 * 1.6 / 1.5 * compute**-0.1, rtol=1e-6)


def test_one_curve_is_a_chart() -> None:
    figure = scaling_chart(
        [Curve("MoBA", "1 M", [1.0, 2.0], [3.0, 2.0])], {}, {}, LOOKS,
        fitted=(), reference="", title="t", loss_name="l", axis=AXES["6nd"],
    )  # fmt: skip
    assert len(tick_labels(drawn(figure)[0], "y")) >= 3


def test_sizes_that_no_law_is_fitted_through_have_hollow_ends() -> None:
    (axes,) = drawn(chart_b(fitted={"1 M parameters", "2 M parameters"}))
    ends = [line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    hollow = [line.get_xdata()[0] for line in ends if line.get_markerfacecolor() == "white"]
    assert (len(ends), hollow) == (3, [2.0])


@pytest.mark.parametrize("scale", [1e-8, 1.0, 40.0, 3000.0])
def test_chart_b_labels_touch_neither_each_other_nor_an_axis(scale: float) -> None:
    (axes,) = drawn(chart_b(scale=scale))
    for which in "xy":
        labels = sorted(tick_labels(axes, which), key=lambda text: getattr(text.get_window_extent(), f"{which}0"))
        assert len(labels) >= 3
        boxes = [text.get_window_extent() for text in labels]
        for one, two in pairwise(boxes):
            assert getattr(one, f"{which}1") < getattr(two, f"{which}0"), [text.get_text() for text in labels]
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x0 > axes.bbox.x0, text.get_text()
        assert box.y0 > axes.bbox.y0, text.get_text()
        for line in axes.get_lines():
            if len(line.get_xdata()) == 3:
                path = axes.transData.transform_path(line.get_path()).interpolated(100)
                assert not box.shrunk(0.9, 0.7).count_contains(path.vertices), "no curve goes through a name"


def position_figure(intervals: bool = True) -> Figure:
    def levels(*losses: float) -> list[Level]:
        return [Level(loss, Interval(loss - 0.02, loss + 0.03) if intervals else None) for loss in losses]

    ranges = [(2048 * i, 2048 * (i + 1)) for i in range(16)]
    losses = {name: [3 + 0.1 * i] * 16 for i, name in enumerate(("Full attention", "MoBA", "last-1"))}
    differences = {"MoBA": levels(*[0.1] * 16), "last-1": levels(*[0.2] * 16)}
    return position_chart(ranges, losses, differences, LOOKS, title="t", loss_name="l", difference_name="d")


def test_positions_have_the_difference_below_with_intervals_that_stand_side_by_side() -> None:
    upper, lower = position_figure().axes
    assert [line.get_label() for line in upper.get_lines()] == ["Full attention", "MoBA", "last-1"]
    moba, last = (container.lines[2][0].get_segments() for container in lower.containers)
    np.testing.assert_allclose(moba[0][:, 1], [0.08, 0.13])
    np.testing.assert_allclose(last[0][:, 1], [0.18, 0.23])
    assert 0 < moba[0][0, 0] < last[0][0, 0] < 2048, "within their range, apart"
    plain = position_figure(intervals=False).axes[1].containers
    assert plain[0].lines[0].get_xdata()[0] == plain[1].lines[0].get_xdata()[0], "nothing to keep apart"


def test_positions_are_written_one_way_and_do_not_touch() -> None:
    _, lower = drawn(position_figure())
    labels = tick_labels(lower, "x")
    assert [text.get_text() for text in labels] == [f"{4096 * i:,}" for i in range(9)]
    for one, two in pairwise(text.get_window_extent() for text in labels):
        assert one.x1 < two.x0
    assert list(lower.xaxis.get_minorticklocs()) == [2048 * i for i in range(1, 16, 2)], "a line at every range"


def test_candidates_are_dots_with_intervals_beside_full_attention_and_the_noise() -> None:
    def level(percent: float) -> Level:
        return Level(percent, Interval(percent - 0.5, percent + 0.5))

    rows = [
        Candidate("hybrid", level(0.7), level(0.5), None, "8% of keys"),
        Candidate("keys", level(7.0), level(6.0), level(10.3), "5% of keys"),
    ]
    looks = {"hybrid": LOOKS["last-1"], "keys": LOOKS["MoBA"]}
    noise = 0.4, "4 runs of 2 arms"
    (axes,) = drawn(candidates_chart(rows, looks, noise, title="t", reference="Full attention", difference_name="d"))
    assert axes.get_xscale() == "linear", "long bars must look long"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["hybrid", "keys"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first on top"
    dots = [(bar.lines[0].get_xdata()[0], bar.lines[0].get_marker(), to_hex(bar.lines[0].get_color()))
            for bar in axes.containers]  # fmt: skip
    first, second = "#ee7733", BLUE.lower()
    assert dots == [(0.7, "o", first), (7.0, "o", second), (0.5, "s", first), (6.0, "s", second), (10.3, "D", second)]
    np.testing.assert_allclose(axes.containers[0].lines[2][0].get_segments()[0][:, 0], [0.2, 1.2])
    (legend,) = axes.figure.legends
    assert "Within the noise of seeds (4 runs of 2 arms)" in [text.get_text() for text in legend.get_texts()]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.4, 0.4))
    (line,) = [line for line in axes.get_lines() if line.get_label() == "Full attention"]
    assert (list(line.get_xdata()), to_hex(line.get_color())) == ([0, 0], RED.lower())
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["8% of keys", "5% of keys"]
    labels = sorted(tick_labels(axes, "x"), key=lambda text: text.get_window_extent().x0)
    assert {"0", "+2%", "+4%"} <= {text.get_text() for text in labels}
    for one, two in pairwise(text.get_window_extent() for text in labels):
        assert one.x1 < two.x0


@pytest.mark.parametrize("worst", [3.0, 13.9, 22.3, 40.0])
@pytest.mark.parametrize("best", [-3.2, 0.5])
def test_percentages_below_candidates_do_not_touch(best: float, worst: float) -> None:
    rows = [Candidate(name, Level(loss), None, None, "29.9% of keys, 1.76x tokens/s") for name, loss in
            (("last-2-keys", best), ("MoBA", worst))]  # fmt: skip
    looks = {"last-2-keys": LOOKS["last-1"], "MoBA": LOOKS["MoBA"]}
    (axes,) = drawn(candidates_chart(rows, looks, None, title="t", reference="Full attention", difference_name="d"))
    labels = sorted(tick_labels(axes, "x"), key=lambda text: text.get_window_extent().x0)
    assert len(labels) >= 4
    for one, two in pairwise(text.get_window_extent() for text in labels):
        assert one.x1 < two.x0, [text.get_text() for text in labels]


def test_charts_are_saved_as_png_and_svg_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = save(chart_a(), tmp_path / "one" / "chart")
    second = save(chart_a(), tmp_path / "two" / "chart")
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_chart_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = save(chart_a(), tmp_path / "chart")
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*chart\.png: No space left"):
        save(chart_b(), tmp_path / "chart")
    assert [path.read_bytes() for path in files] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_dots_in_a_name_are_kept(tmp_path: Path) -> None:
    files = [*save(chart_a(), tmp_path / "v1.0-scaling-law"), *save(chart_a(), tmp_path / "v1.0-positions")]
    assert [path.name for path in files] == [
        "v1.0-scaling-law.png", "v1.0-scaling-law.svg", "v1.0-positions.png", "v1.0-positions.svg",
    ]  # fmt: skip
