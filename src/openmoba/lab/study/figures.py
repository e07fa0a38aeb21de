"""The charts: layer-wise hybrid (chart A) and scaling law (chart B); `openmoba.lab.study.panels` has the others.

Arms differ in colour, line style and marker (`openmoba.lab.study.looks`), so that the charts survive grey printing and
colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from openmoba.lab.measure.compute import Axis
from openmoba.lab.measure.resample import LEVEL, Interval
from openmoba.lab.study.fit import Fit
from openmoba.records.figures import BLUE, GREY, HALO, RED, TITLE_WIDTH, Look, chart_style, legend_below, new_figure

EVEN_STEPS = 1.8  # highest loss of an axis over its lowest, up to which losses are written in even steps
LOG_STEPS = (
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1,),
)
_PROJECTION = " Projection: "  # stands in the names of laws alone
MOST_TICKS = 8
BAR_ASIDE = 0.06  # of the way between two hybrids
PANEL = np.array([440.0, 290.0])  # points, about: width and height of the scaling chart's panel
NEAR = 0.03  # of the axis: ends of a size's curves that are so near share its name
NAME_SIZE = 9  # points
NAME_WIDTH = 0.6  # of a character, in its height
NAME_PLACES = (("center", 0.5, 0, -7), ("left", 0.0, 7, 3), ("right", 1.0, -7, -3), ("left", 0.0, 7, -3))
"""Where a size's name may stand beside the end of a curve, the best first: how it is aligned, the share of it to the
left of its place, and that place, in points from the end."""


@dataclass(frozen=True)
class Level:
    """A loss, or a difference of losses, in nats, with the interval that its bar shows; None draws no bar."""

    loss: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Curve:
    """Loss along training, one entry per evaluation; `size` is written at its end."""

    arm: str
    size: str
    compute: Sequence[float]
    loss: Sequence[float]


def layers_chart(
    hybrid: Mapping[str, Level],
    full: float | None,
    moba: Level | None,
    from_moba: Mapping[str, Level],
    *,
    title: str,
    layers_name: str,
    loss_name: str,
) -> Figure:
    """Draw chart A: loss over the full layers, between the lines of MoBA and full attention.

    A bar has the colour of the line that it is read against: one that does not reach it is resolved from it.

    Args:
        hybrid: what names a hybrid's full layers -> loss, in the order to show, and the bar against full attention.
        full, moba: the two horizontal lines; None leaves one out. MoBA's bar, against full attention, stands at the end
            of its line.
        from_moba: some of the names of `hybrid` -> the same loss with the bar against MoBA.
        layers_name: what the names of `hybrid` say.
    """
    with chart_style():
        figure = new_figure()
        axes = figure.add_subplot()
        end = len(hybrid) - 0.5
        if moba:
            axes.axhline(moba.loss, color=GREY, linewidth=2, label="MoBA")
        if full is not None:
            axes.axhline(full, color=RED, linewidth=2, label="Full Attention")
        names, levels = list(hybrid), list(hybrid.values())
        losses = [level.loss for level in levels]
        axes.plot(losses, color=BLUE, linestyle="--", marker="o", markersize=8, linewidth=2, label="Layer-wise Hybrid")
        against_full = dict(zip((place - BAR_ASIDE for place in range(len(levels))), levels, strict=True))
        if moba:
            against_full[end - 0.15] = moba
        _bars(axes, against_full, RED, "from full attention")
        _bars(axes, {names.index(name) + BAR_ASIDE: level for name, level in from_moba.items()}, GREY, "from MoBA")
        axes.set_xticks(range(len(levels)), names)
        axes.set_xlim(-0.5, end)
        axes.margins(y=0.12)
        axes.grid(visible=False, axis="x")
        axes.set(title=fill(title, TITLE_WIDTH), xlabel=layers_name, ylabel=loss_name)
        legend_below(figure, axes)
    return figure


def scaling_chart(
    curves: Sequence[Curve],
    laws: Mapping[str, Fit],
    differences: Mapping[str, tuple[Fit, Fit]],
    looks: Mapping[str, Look],
    *,
    fitted: Collection[str],
    reference: str,
    title: str,
    loss_name: str,
    axis: Axis,
) -> Figure:
    """Draw chart B: every model's loss over its compute, and each arm's fitted law through the end points.

    Args:
        curves: one per arm and size, arms named as in `laws`.
        laws: arm -> law through the ends of its curves; an arm without a law shows its curves only.
        differences: arm -> its law and that of `reference` over the runs that both have, of `fit_arms`. The band around
            the arm's law is the interval of their ratio, laid on the drawn law of the reference, where both are drawn:
            from below the least compute of their own runs to above the most.
        looks: arm -> how it is drawn.
        fitted: the sizes that the laws are fitted through; the markers of others are hollow.
        reference: the arm that the others are compared with.
        axis: what their compute is.
    """
    with chart_style():
        figure = new_figure(height=5.6)
        axes = figure.add_subplot()
        axes.set(
            xscale="log",
            yscale="log",
            title=fill(title, TITLE_WIDTH),
            xlabel=f"{axis.caption} ({axis.unit})",
            ylabel=loss_name,
        )
        shown = [float(fit.law(_beyond(fit.compute)[-1])) for fit in laws.values()]
        for arm in dict.fromkeys(curve.arm for curve in curves):
            own = [curve for curve in curves if curve.arm == arm]
            _draw_curves(axes, arm, own, looks[arm], fitted if laws else {curve.size for curve in own})
            if arm in laws:
                _draw_law(axes, arm, laws[arm], looks[arm].colour)
            if arm in differences and reference in laws:
                shown += _draw_band(axes, *differences[arm], laws[reference], looks[arm].colour)
        _frame(axes, curves, shown)
        _name_sizes(axes, curves, looks)
        _plain_log_ticks(axes)
        _name_lines(figure, axes, columns=2 if laws else 4)
    return figure


def _draw_curves(axes: Axes, arm: str, curves: Sequence[Curve], look: Look, fitted: Collection[str]) -> None:
    """Draw an arm's losses over its compute, with a marker at each end, filled for `fitted` sizes."""
    colour, marker, _ = look
    for curve in curves:
        face = colour if curve.size in fitted else "white"
        axes.plot(curve.compute, curve.loss, color=colour, linewidth=1.3, alpha=0.8)
        axes.plot(curve.compute[-1], curve.loss[-1], color=colour, marker=marker, markersize=6, markerfacecolor=face)
    axes.plot([], [], color=colour, marker=marker, linewidth=1.3, label=arm)


def _draw_law(axes: Axes, arm: str, fit: Fit, colour: str) -> None:
    law, grid_P = fit.law, _beyond(fit.compute)
    name = f"{arm}{_PROJECTION}{law.a:#.3g} · C$^{{{law.b:.3f}}}$"
    axes.plot(grid_P, law(grid_P), color=colour, linestyle="--", linewidth=1.6, label=name)


def _name_lines(figure: Figure, axes: Axes, columns: int) -> None:
    """Put names below the axes, those of laws after all others: a column each."""
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda place: _PROJECTION in names[place])
    figure.legend(
        [handles[place] for place in order], [names[place] for place in order],
        loc="outside lower center", ncols=columns, handlelength=3,
    )  # fmt: skip


def error_bars(levels: Sequence[Level]) -> Any:
    """Return [2, N] distances below and above; 0 for a level without an interval."""
    bounds = [level.interval or Interval(level.loss, level.loss) for level in levels]
    below = [max(0.0, level.loss - bound.low) for level, bound in zip(levels, bounds, strict=True)]
    above = [max(0.0, bound.high - level.loss) for level, bound in zip(levels, bounds, strict=True)]
    return [below, above]


def _bars(axes: Axes, levels: Mapping[float, Level], colour: str, against: str) -> None:
    """Draw the intervals of differences from a line, in its colour, at their places; none of levels without one."""
    barred = {place: level for place, level in levels.items() if level.interval}
    if barred:
        axes.errorbar(
            list(barred), [level.loss for level in barred.values()], yerr=error_bars(list(barred.values())),
            fmt="none", capsize=4, linewidth=2, color=colour, label=f"{LEVEL:.0%} of the difference {against}",
        )  # fmt: skip


def _draw_band(axes: Axes, own: Fit, other: Fit, drawn: Fit, colour: str) -> list[float]:
    """Lay the interval of the ratio of two laws on the drawn one of the other's arm, where both are drawn.

    Returns:
        The lowest loss of the band; nothing where there is none.
    """
    grids = [_beyond(fit.compute) for fit in (own, other)]
    begin, end = max(grid[0] for grid in grids), min(grid[-1] for grid in grids)
    if begin >= end:
        return []
    grid_P = np.geomspace(begin, end, 100)
    low_P, high_P = (drawn.law(grid_P) * ratio_P for ratio_P in own.ratio(other, grid_P))
    axes.fill_between(grid_P, low_P, high_P, color=colour, alpha=0.14, linewidth=0)
    for edge_P in (low_P, high_P):  # a band is told from another that it overlaps by its edges
        axes.plot(grid_P, edge_P, color=colour, linewidth=0.7, alpha=0.6)
    return [float(low_P.min())]


def _beyond(ends: Any) -> np.ndarray[Any, Any]:
    """Return amounts of compute from below the least of `ends`, [N], to above the largest."""
    reach = max(2.0, (max(ends) / min(ends)) ** 0.2)
    return np.geomspace(min(ends) / reach, max(ends) * reach, 100)


def _frame(axes: Axes, curves: Sequence[Curve], far: Sequence[float]) -> None:
    """Show the ends, what leads to them, and the laws' far ends; curves begin at a random model's loss, far above."""
    grid_P = _beyond([curve.compute[-1] for curve in curves])
    shown = [loss for curve in curves for c, loss in zip(curve.compute, curve.loss, strict=True) if c >= grid_P[0] / 4]
    ends = [curve.loss[-1] for curve in curves]
    low, high = min([*ends, *far]), min(max(shown) * 1.03, max(ends) * 1.7)
    axes.set_xlim(grid_P[0] / 5, grid_P[-1] * 1.2)
    axes.set_ylim(low / (high / low) ** 0.05, high)


def _name_sizes(axes: Axes, curves: Sequence[Curve], looks: Mapping[str, Look]) -> None:
    """Write the size at the end of every curve, once where several of one size end at about the same compute.

    Of the places beside the end it takes the first that crosses the least: lines, solid ones above all, ends and other
    names. A name that stands for one arm has its colour.
    """

    def points(places_P2: Any) -> Any:
        return axes.transAxes.inverted().transform(axes.transData.transform(places_P2)) * PANEL

    ends = {id(curve): points([[curve.compute[-1], curve.loss[-1]]])[0] for curve in curves}
    lines = [_dense(points(line.get_xydata())) for line in axes.lines if len(line.get_xdata()) > 1]  # type: ignore[arg-type]
    solid = [_dense(points(np.column_stack([curve.compute, curve.loss]))) for curve in curves if len(curve.loss) > 1]
    taken_P2 = np.concatenate([*lines, *solid, *solid, *(_grid(end - 4, end + 4) for end in ends.values())])
    for group in _ends_together(curves, ends):
        curve = group[-1]
        end, wide = ends[id(curve)], NAME_SIZE * NAME_WIDTH * len(curve.size)
        boxes = []
        for _, share, aside, above in NAME_PLACES:
            corner = end + np.array([aside - share * wide, above - NAME_SIZE * (above < 0)])
            boxes.append((corner, corner + np.array([wide, NAME_SIZE])))
        crossed = [int(((taken_P2 > low) & (taken_P2 < high)).all(axis=1).sum()) for low, high in boxes]
        best = crossed.index(min(crossed))
        taken_P2 = np.concatenate([taken_P2, _grid(*boxes[best])])
        across, _, aside, above = NAME_PLACES[best]
        axes.annotate(
            curve.size, (curve.compute[-1], curve.loss[-1]), xytext=(aside, above), textcoords="offset points",
            ha=across, va="top" if above < 0 else "bottom", fontsize=NAME_SIZE, zorder=5, annotation_clip=False,
            color=looks[curve.arm].colour if len(group) == 1 else "black",
            path_effects=HALO,
        )  # fmt: skip


def _ends_together(curves: Sequence[Curve], ends: Mapping[int, Any]) -> list[list[Curve]]:
    """Group the curves of a size whose ends lie above each other, the lowest last."""
    groups: list[list[Curve]] = []
    for curve in sorted(curves, key=lambda curve: (curve.size, curve.compute[-1])):
        last = groups[-1] if groups else []
        if last and last[0].size == curve.size and ends[id(curve)][0] - ends[id(last[0])][0] < NEAR * PANEL[0]:
            last.append(curve)
        else:
            groups.append([curve])
    return [sorted(group, key=lambda curve: -curve.loss[-1]) for group in groups]


def _dense(line_P2: Any) -> Any:
    """Put points along a line, [Q, 2], one in each unit of its length."""
    along_P = np.concatenate([[0.0], np.hypot(*np.diff(line_P2, axis=0).T).cumsum()])
    along_Q = np.arange(0.0, along_P[-1])
    return np.stack([np.interp(along_Q, along_P, values_P) for values_P in np.transpose(line_P2)], axis=1)


def _grid(low: Any, high: Any) -> Any:
    """Fill a box with points, [Q, 2]: crossing it counts more than crossing a line."""
    return np.stack(np.meshgrid(*np.linspace(low, high, 9).T), axis=-1).reshape(-1, 2)


def _plain_log_ticks(axes: Axes) -> None:
    """Set few plain numbers; a log axis of less than a decade would have hardly a label, or two that touch."""
    axes.yaxis.set_major_locator(_loss_locator(*axes.get_ylim()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if low >= 1 else _power(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _loss_locator(low: float, high: float) -> Locator:
    """Return where losses are written: in even steps, or where the axis spans more, closer together further down."""
    if high / low < EVEN_STEPS:
        return MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in LOG_STEPS:
        ticks = [step * decade for decade in decades for step in steps if low <= step * decade <= high]
        if len(ticks) <= MOST_TICKS:
            break
    return FixedLocator(ticks)


def _power(value: float) -> str:
    """Write a number as a multiple of a power of ten, for matplotlib."""
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = value / 10.0**exponent
    return f"$10^{{{exponent}}}$" if abs(factor - 1) < 1e-6 else f"${factor:.0f}\\cdot10^{{{exponent}}}$"
