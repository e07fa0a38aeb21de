"""The charts: layer-wise hybrid (chart A) and scaling law (chart B); `openmoba.lab.study.panels` has the others.

Arms differ in colour, line style and marker, so that the charts survive grey printing and colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
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
from openmoba.lab.measure.resample import Interval
from openmoba.lab.study.fit import Fit
from openmoba.records.figures import BLUE, GREY, RED, TITLE_WIDTH, chart_style, new_figure

EVEN_STEPS = 1.8  # highest loss of an axis over its lowest, up to which losses are written in even steps
LOG_STEPS = (
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1,),
)
MOST_TICKS = 8


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
    *,
    title: str,
    layers_name: str,
    loss_name: str,
) -> Figure:
    """Draw chart A: loss over the full layers, between the lines of MoBA and full attention.

    Args:
        hybrid: what names a hybrid's full layers -> loss, in the order to show.
        full, moba: the two horizontal lines; None leaves one out. MoBA's bar stands at the end of its line.
        layers_name: what the names of `hybrid` say.
    """
    with chart_style():
        figure = new_figure()
        axes = figure.add_subplot()
        end = len(hybrid) - 0.5
        bars: Any = {"fmt": "none", "capsize": 4, "linewidth": 2}
        if moba:
            axes.axhline(moba.loss, color=GREY, linewidth=2, label="MoBA")
            axes.errorbar([end - 0.15], [moba.loss], yerr=error_bars([moba]), color=GREY, **bars)
        if full is not None:
            axes.axhline(full, color=RED, linewidth=2, label="Full Attention")
        levels = list(hybrid.values())
        losses = [level.loss for level in levels]
        axes.plot(losses, color=BLUE, linestyle="--", marker="o", markersize=8, linewidth=2, label="Layer-wise Hybrid")
        axes.errorbar(range(len(levels)), losses, yerr=error_bars(levels), color=BLUE, **bars)
        axes.set_xticks(range(len(levels)), list(hybrid))
        axes.set_xlim(-0.5, end)
        axes.margins(y=0.12)
        axes.grid(visible=False, axis="x")
        axes.set(title=fill(title, TITLE_WIDTH), xlabel=layers_name, ylabel=loss_name)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=3, handlelength=3)
    return figure


def scaling_chart(
    curves: Sequence[Curve],
    laws: Mapping[str, Fit],
    differences: Mapping[str, tuple[Fit, Fit]],
    *,
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
        for arm, (colour, _, marker) in arm_styles(curve.arm for curve in curves).items():
            for curve in (curve for curve in curves if curve.arm == arm):
                axes.plot(curve.compute, curve.loss, color=colour, linewidth=1.3, alpha=0.8)
                axes.plot(curve.compute[-1], curve.loss[-1], color=colour, marker=marker, markersize=6)
            axes.plot([], [], color=colour, marker=marker, linewidth=1.3, label=arm)
            if arm in laws:
                law, grid_P = laws[arm].law, _beyond(laws[arm].compute)
                name = f"{arm} Projection: {law.a:#.3g} · C$^{{{law.b:.3f}}}$"
                axes.plot(grid_P, law(grid_P), color=colour, linestyle="--", linewidth=1.6, label=name)
            if arm in differences:
                _draw_band(axes, *differences[arm], laws[reference], colour)
        _frame(axes, curves, [float(fit.law(_beyond(fit.compute)[-1])) for fit in laws.values()])
        _name_sizes(axes, curves)
        _plain_log_ticks(axes)
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda place: " Projection: " in names[place])  # a column each
        figure.legend(
            [handles[place] for place in order], [names[place] for place in order],
            loc="outside lower center", ncols=2 if laws else 4, handlelength=3,
        )  # fmt: skip
    return figure


def arm_styles(arms: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Return colour, dash pattern and marker of every arm: full attention red, MoBA blue, others as they come."""
    dashes = ["--", "-.", ":", (0, (5, 1))]
    colours = ["#EE7733", "#009988", "#EE3377", "#33BBEE", "#AA3377", "#888800", "#444444"]
    others = zip(cycle(colours), cycle(dashes), cycle("^DvPX<>p*h"), strict=False)
    fixed = {"Full attention": (RED, "-", "s"), "MoBA": (BLUE, "-", "o")}
    return {arm: fixed.get(arm) or next(others) for arm in dict.fromkeys(arms)}


def error_bars(levels: Sequence[Level]) -> Any:
    """Return [2, N] distances below and above; 0 for a level without an interval."""
    bounds = [level.interval or Interval(level.loss, level.loss) for level in levels]
    below = [max(0.0, level.loss - bound.low) for level, bound in zip(levels, bounds, strict=True)]
    above = [max(0.0, bound.high - level.loss) for level, bound in zip(levels, bounds, strict=True)]
    return [below, above]


def _draw_band(axes: Axes, own: Fit, other: Fit, drawn: Fit, colour: str) -> None:
    """Lay the interval of the ratio of two laws on the drawn one of the other's arm, where both are drawn."""
    grids = [_beyond(fit.compute) for fit in (own, other)]
    begin, end = max(grid[0] for grid in grids), min(grid[-1] for grid in grids)
    if begin < end:
        grid_P = np.geomspace(begin, end, 100)
        low_P, high_P = own.ratio(other, grid_P)
        level_P = drawn.law(grid_P)
        axes.fill_between(grid_P, level_P * low_P, level_P * high_P, color=colour, alpha=0.18, linewidth=0)


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


def _name_sizes(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each size's name once, above the end of its curves that is farthest to the right and up."""
    limits = np.log([axes.get_xlim(), axes.get_ylim()])

    def place(curve: Curve) -> float:
        end = np.log([curve.compute[-1], curve.loss[-1]])
        return float(((end - limits[:, 0]) / (limits[:, 1] - limits[:, 0])).sum())

    for size in dict.fromkeys(curve.size for curve in curves):
        last = max((curve for curve in curves if curve.size == size), key=place)
        axes.annotate(
            size, (last.compute[-1], last.loss[-1]), xytext=(4, 4), ha="left", va="bottom", fontsize=10,
            textcoords="offset points", zorder=5, path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip


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
