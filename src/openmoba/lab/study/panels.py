"""Charts of several arms side by side: loss by position, and the candidates of a short list as dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from openmoba.lab.study.figures import Level, error_bars
from openmoba.records.figures import GREY, RED, Look, chart_style, legend_below, new_figure

Numbers = np.ndarray[Any, Any]

MOST_TICKS = 9
MARKS = (
    ("trailing", "Trailing loss", "o", True, -0.17),
    ("lm", "LM loss", "s", False, 0.0),
    ("own", "Trailing, against full + key conv.", "D", True, 0.17),
)
"""A candidate's losses: their names in `Candidate` and in the legend, marker, whether it is filled, and rows aside."""


@dataclass(frozen=True)
class Candidate:
    """One arm of a short list; differences are in percent of the loss of the arm they are taken from.

    Attributes:
        name: the arm.
        trailing, lm: from full attention; None for an arm without this loss.
        own: of the trailing loss, from full attention with the same key convolution, for an arm that has one.
        cost: what stands at the end of its row.
    """

    name: str
    trailing: Level | None
    lm: Level | None
    own: Level | None
    cost: str


def position_chart(
    ranges: Sequence[tuple[int, int]],
    losses: Mapping[str, Sequence[float]],
    differences: Mapping[str, Sequence[Level]],
    looks: Mapping[str, Look],
    *,
    title: str,
    loss_name: str,
    difference_name: str,
) -> Figure:
    """Draw the loss by position, and below it a difference with its intervals.

    Args:
        ranges: first position of every range, and the one after its last.
        losses: curve's name -> its loss in every range.
        differences: name of some of these curves -> what the lower panel shows of it in every range.
        looks: curve's name -> how it is drawn.
    """
    edges = np.array([ranges[0][0], *(end for _, end in ranges)])
    centre = (edges[1:] + edges[:-1]) / 2
    barred = any(level.interval for levels in differences.values() for level in levels)
    apart = min(0.13, 0.6 / max(1, len(differences))) * np.diff(edges) * barred
    points = {
        name: (centre + (place - (len(differences) - 1) / 2) * apart, levels)
        for place, (name, levels) in enumerate(differences.items())
    }
    with chart_style():
        figure, upper, lower = _two_panels(centre, losses, points, looks)
        upper.set(title=title, ylabel=loss_name)
        lower.set(xlabel="Position in the window (tokens)", ylabel=difference_name)
        _position_ticks(lower, edges)
    return figure


def context_chart(
    contexts: Sequence[int],
    losses: Mapping[str, Sequence[float]],
    lost: Mapping[str, Sequence[Level]],
    looks: Mapping[str, Look],
    *,
    title: str,
    loss_name: str,
    difference_name: str,
) -> Figure:
    """Draw the loss of the same tokens over how many are in sight, and below it what each context lacks to the last.

    Args:
        contexts: tokens in sight, the whole window last.
        losses: curve's name -> its loss with every context.
        lost: the same names -> loss with every context but the last, minus that with the last.
        looks: the same names -> how they are drawn.
    """
    points = {}
    for place, (name, levels) in enumerate(lost.items()):
        apart = 0.04 * (place - (len(lost) - 1) / 2)
        beside = np.array([*(context * 2.0**apart for context in contexts[:-1]), contexts[-1]])
        points[name] = (beside, [*levels, Level(0.0)])
    with chart_style():
        figure, upper, lower = _two_panels(np.array(contexts), losses, points, looks)
        upper.set(title=title, ylabel=loss_name, xscale="log")
        lower.set(xlabel="Tokens in sight, up to the last one", ylabel=difference_name)
        lower.set_xticks(contexts, [f"{context:,}" for context in contexts])
        lower.xaxis.set_minor_locator(NullLocator())
    return figure


def candidates_chart(
    candidates: Sequence[Candidate],
    looks: Mapping[str, Look],
    noise: tuple[float, str] | None,
    *,
    title: str,
    reference: str,
    difference_name: str,
) -> Figure:
    """Draw every candidate's difference from a reference as a dot with its interval, the first one on top.

    Args:
        looks: arm -> how it is drawn; a dot has the arm's colour, its marker says which loss it is.
        noise: the least difference, in percent, that the noise of seeds lets one see, and how many seeds say so; None
            draws no band.
    """
    with chart_style():
        figure = new_figure(height=2.0 + 0.46 * len(candidates))
        axes = figure.add_subplot()
        axes.axvline(0, color=RED, linewidth=2, label=reference)
        for name, label, marker, filled, aside in MARKS:
            rows = [(row, item, level) for row, item in enumerate(candidates) if (level := getattr(item, name))]
            for row, item, level in rows:
                colour = looks[item.name].colour
                axes.errorbar(
                    [level.loss], [row + aside], xerr=error_bars([level]), fmt=marker, color=colour,
                    markerfacecolor=colour if filled else "white", markersize=6, capsize=3, linewidth=1.4,
                )  # fmt: skip
            if rows:
                face = "black" if filled else "white"
                axes.plot([], [], marker, color="black", markerfacecolor=face, markersize=6, label=label)
        if noise is not None:
            smallest, seeds = noise
            label = f"Within the noise of seeds ({seeds})"
            axes.axvspan(-smallest, smallest, color=GREY, alpha=0.15, linewidth=0, label=label)
        axes.set_yticks(range(len(candidates)), [item.name for item in candidates])
        axes.set_ylim(len(candidates) - 0.5, -0.5)
        axes.set(title=title, xlabel=difference_name)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        costs = axes.secondary_yaxis("right")
        costs.set_yticks(range(len(candidates)), [item.cost for item in candidates], fontsize=9, color=GREY)
        costs.tick_params(length=0)
        costs.spines["right"].set_visible(False)
        legend_below(figure, axes)
    return figure


def _two_panels(
    x: Numbers,
    losses: Mapping[str, Sequence[float]],
    points: Mapping[str, tuple[Numbers, Sequence[Level]]],
    looks: Mapping[str, Look],
) -> tuple[Figure, Axes, Axes]:
    """Draw curves over `x`, and below them what is shown of some of them: its places, and levels with their bars."""
    figure = new_figure(height=6.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, loss in losses.items():
        upper.plot(x, loss, label=name, **looks[name].options())
    lower.axhline(0, color=GREY, linewidth=1)
    for name, (beside, levels) in points.items():
        mean = [level.loss for level in levels]
        lower.errorbar(beside, mean, yerr=error_bars(levels), capsize=2.5, elinewidth=1.2, **looks[name].options())
    for axes in (upper, lower):
        axes.locator_params(axis="y", nbins=6)
    figure.align_ylabels((upper, lower))
    legend_below(figure, upper)
    return figure, upper, lower


def _position_ticks(axes: Axes, edges: Numbers) -> None:
    """Set a line at every edge of a range, and a number at few enough of them."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, len(edges)) if (len(edges) - 1) / step < MOST_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(edges[::step].tolist()))
    axes.xaxis.set_minor_locator(FixedLocator(edges.tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(edges[0], edges[-1])


def _percent(value: float, _: int) -> str:
    """Write a signed percentage."""
    return f"{value:+.3g}%".replace("-", "−") if value else "0"
