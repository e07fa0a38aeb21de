"""The charts: layer-wise hybrid (chart A), scaling law (chart B), and loss by position.

Arms differ in colour, line style and marker, so that the charts survive grey printing and colour-blind eyes
(colours of Paul Tol's "vibrant" scheme). Every function returns a figure; `save` writes it as PNG and SVG.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from openmoba.lab.fit import Fit, Interval

BLUE, RED, GREY = "#0077BB", "#CC3311", "#666666"

AXES = {
    "6nd": "Training compute, 6·N·tokens (PFLOP/s-days)",
    "chinchilla": "Training compute with embeddings and softmax (PFLOP/s-days)",
    "causal_exact": "Training compute, attention at its real reads (PFLOP/s-days)",
    "accelerator_seconds": "Measured accelerator time (s)",
}

STYLE: Any = {  # matplotlib types the keys of its settings one by one
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "openmoba",
}


@dataclass(frozen=True)
class Level:
    """One arm's loss in nats, with the interval its error bar or band shows; None draws no bar."""

    loss: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Curve:
    """Loss along one training run, one entry per evaluation; `size` is written at its end."""

    arm: str
    size: str
    compute: Sequence[float]
    loss: Sequence[float]


@dataclass(frozen=True)
class PositionRange:
    """Loss of one arm at the positions `start` to `end - 1`."""

    start: int
    end: int
    level: Level


def layers_chart(
    hybrid: Mapping[str, Level],
    full: Level | None,
    moba: Level | None,
    *,
    title: str,
    layers_name: str,
    loss_name: str,
) -> Figure:
    """Chart A: loss over the full layers, between the lines of MoBA and full attention.

    Args:
        hybrid: what names a hybrid's full layers -> loss, in the order to show.
        full, moba: the two horizontal lines; None leaves one out.
        layers_name: what the names of `hybrid` say.
    """
    with _style():
        figure = _figure()
        axes = figure.add_subplot()
        if moba:
            _horizontal(axes, moba, GREY, "MoBA")
        levels = list(hybrid.values())
        axes.errorbar(
            range(len(levels)), [level.loss for level in levels], yerr=_error_bars(levels),
            color=BLUE, linestyle="--", marker="o", markersize=8, linewidth=2, capsize=4,
            label="Layer-wise hybrid",
        )  # fmt: skip
        if full:
            _horizontal(axes, full, RED, "Full attention")
        axes.set_xticks(range(len(levels)), list(hybrid))
        axes.set_xlim(-0.5, len(levels) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set(title=title, xlabel=layers_name, ylabel=loss_name)
        figure.legend(loc="outside lower center", ncols=3, handlelength=3)
    return figure


def scaling_chart(curves: Sequence[Curve], fits: Mapping[str, Fit], *, title: str, loss_name: str, axis: str) -> Figure:
    """Chart B: every run's loss over its compute, and each arm's fitted law through the end points.

    Args:
        curves: one per run, arms named as in `fits`.
        fits: arm -> law through the ends of its curves; an arm without a law shows its curves only.
        axis: a compute convention, a key of `AXES`.
    """
    with _style():
        figure = _figure()
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", title=title, xlabel=AXES[axis], ylabel=loss_name)
        ends = [curve.compute[-1] for curve in curves]
        grid_P = np.geomspace(min(ends) / 2, max(ends) * 2, 100)
        for arm, (colour, _, marker) in arm_styles(curve.arm for curve in curves).items():
            for curve in (curve for curve in curves if curve.arm == arm):
                axes.plot(curve.compute, curve.loss, color=colour, linewidth=1.5, alpha=0.8)
                axes.plot(curve.compute[-1], curve.loss[-1], color=colour, marker=marker, markersize=7)
            axes.plot([], [], color=colour, marker=marker, linewidth=1.5, label=arm)
            if arm in fits:
                _law(axes, fits[arm], grid_P, colour, arm)
        _name_sizes(axes, curves)
        _plain_log_ticks(axes)
        axes.legend()
    return figure


def position_chart(
    arms: Mapping[str, Sequence[PositionRange]], reference: str, *, title: str, loss_name: str
) -> Figure:
    """Loss by position, and below it what every arm loses against the arm `reference`.

    Args:
        arms: arm's name -> its ranges, the same for all arms.
    """
    with _style():
        figure = _figure(height=6.4)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        base = np.array([item.level.loss for item in arms[reference]])
        for arm, (colour, line, marker) in arm_styles(arms).items():
            levels = [item.level for item in arms[arm]]
            loss = np.array([level.loss for level in levels])
            centre = [(item.start + item.end) / 2 for item in arms[arm]]
            look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 6, "linewidth": 1.6}
            upper.errorbar(centre, loss, yerr=_error_bars(levels), capsize=3, label=arm, **look)
            lower.plot(centre, loss - base, **look)
        upper.set(title=title, ylabel=loss_name)
        figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=3)
        lower.set(xlabel="Position in the window (tokens)", ylabel=f"Difference from\n{reference.lower()} (nats)")
        lower.set_xticks([arms[reference][0].start, *(item.end for item in arms[reference])])
        lower.locator_params(axis="y", nbins=5)
    return figure


def arm_styles(arms: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Colour, dash pattern and marker of every arm: full attention red, MoBA blue, others as they come."""
    others = cycle(
        [("#EE7733", "--", "^"), ("#009988", "-.", "D"), ("#EE3377", ":", "v"), ("#33BBEE", (0, (5, 1)), "P")]
    )
    fixed = {"Full attention": (RED, "-", "s"), "MoBA": (BLUE, "-", "o")}
    return {arm: fixed.get(arm) or next(others) for arm in dict.fromkeys(arms)}


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.png and `path`.svg, dots in its name kept; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}{suffix}") for suffix in (".png", ".svg")]
    with _style():
        figure.savefig(files[0], dpi=160)
        figure.savefig(files[1], metadata={"Date": None})
    return files


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def _figure(height: float = 4.8) -> Figure:
    return Figure(figsize=(7.2, height), layout="constrained")


def _horizontal(axes: Axes, level: Level, colour: str, label: str) -> None:
    axes.axhline(level.loss, color=colour, linewidth=2, label=label)
    if level.interval is not None:
        axes.axhspan(level.interval.low, level.interval.high, color=colour, alpha=0.12, linewidth=0)


def _error_bars(levels: Sequence[Level]) -> Any:
    """[2, N] distances below and above, or None when no level has an interval."""
    if all(level.interval is None for level in levels):
        return None
    bounds = [level.interval or Interval(level.loss, level.loss) for level in levels]
    below = [max(0.0, level.loss - bound.low) for level, bound in zip(levels, bounds, strict=True)]
    above = [max(0.0, bound.high - level.loss) for level, bound in zip(levels, bounds, strict=True)]
    return [below, above]


def _law(axes: Axes, fit: Fit, grid_P: np.ndarray[Any, Any], colour: str, name: str) -> None:
    label = f"{name} projection: {fit.law.a:.3g} · C$^{{{fit.law.b:.3f}}}$"
    axes.plot(grid_P, fit.law(grid_P), color=colour, linestyle="--", linewidth=1.6, label=label)
    axes.fill_between(grid_P, *fit.band(grid_P), color=colour, alpha=0.10, linewidth=0)


def _name_sizes(axes: Axes, curves: Sequence[Curve]) -> None:
    """Each size's name once, under the lowest end of its curves."""
    for size in dict.fromkeys(curve.size for curve in curves):
        lowest = min((curve for curve in curves if curve.size == size), key=lambda curve: curve.loss[-1])
        axes.annotate(
            size, (lowest.compute[-1], lowest.loss[-1]), xytext=(-4, -8), ha="right", va="top", fontsize=9.5,
            textcoords="offset points", color=GREY,
        )  # fmt: skip


def _plain_log_ticks(axes: Axes) -> None:
    """Losses as plain numbers; a log axis of less than a decade would otherwise have hardly a label."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
