"""How a study writes sizes, compute and differences, and which differences it calls resolved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from openmoba.lab.columns import short
from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import Difference, Interval
from openmoba.lab.study.outcomes import Named, Outcome
from openmoba.lab.study.recipe import Recipe

LOSSES: dict[Named, str] = {"lm": "LM loss", "trailing": "trailing loss"}


def inside(label: str) -> str:
    """Write an arm's name inside a sentence: "Full attention" loses its capital, "MoBA" keeps it."""
    return label[:1].lower() + label[1:] if label[1:].islower() else label


def size_name(run: Outcome) -> str:
    """Name a size by its parameters without embeddings, in whole millions from two on: 792 K, 2 M, 14 M."""
    count = float(run.parameters)
    return short(round(count, -6)) if 1.5e6 < count < 1e9 else short(count)


def spent(axis: str, value: float) -> str:
    """Write an amount of compute with its convention: "1.0e-04 PFLOP/s-days by 6ND", "136 accelerator seconds"."""
    shown = AXES[axis]
    return (
        f"{value:{shown.form}} {shown.head}"
        if shown.head.endswith(shown.unit)
        else f"{shown.amount(value)} by {shown.head}"
    )


def listed(names: Iterable[str]) -> str:
    """Write names as a sentence does: "a", "a and b", "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def so_far(recipe: Recipe, outcomes: Sequence[Outcome]) -> str:
    """Say how many runs of an unfinished study there are: "7 of 29 runs so far"; "" of a finished one."""
    return f"{len(outcomes)} of {len(recipe.runs)} runs so far" if len(outcomes) < len(recipe.runs) else ""


def nats(found: Difference) -> str:
    """Write a difference in nats with its interval."""
    return f"{found.mean:+.4f} nats{bounds(found.interval)}"


def in_percent(found: Difference, loss: float, sign: str = "%") -> str:
    """Write a difference and its interval in percent of `loss`.

    Args:
        sign: behind every number; a column that says percent needs none.
    """
    ends = found.interval and [f"{100 * end / loss:+.2f}{sign}" for end in (found.interval.low, found.interval.high)]
    return f"{100 * found.mean / loss:+.2f}{sign}{f' [{ends[0]}, {ends[1]}]' if ends else ''}"


def bounds(interval: Interval | None) -> str:
    """Write an interval in brackets, after a space; nothing for None."""
    return "" if interval is None else f" [{interval.low:+.4f}, {interval.high:+.4f}]"


def place(share: float, resolved: bool) -> str:
    """Say where a difference lies, without an interval: "1.2% above", or "within noise"."""
    return f"{abs(share):.1%} {'below' if share < 0 else 'above'}" if resolved else "within noise"


def place_before(share: float, resolved: bool) -> str:
    """Say the same to stand before a noun: "1.2% above", or "within noise of"."""
    return place(share, resolved) + ("" if resolved else " of")


def verdict(found: Difference) -> str:
    """Say whether a difference is resolved, and whether its interval holds the luck of a seed."""
    return word(found.resolved, found.noise is not None)


def word(resolved: bool, seeds_known: bool) -> str:
    """Say whether something is resolved; of a single seed, that it holds for this one."""
    if not resolved:
        return "**within noise**"
    return "**resolved**" if seeds_known else "**resolved on these windows**, for this one seed"


def span(run: Outcome, number: int) -> str:
    """Write the positions of a range."""
    start, end = run.ranges[number]
    return f"{start:,}-{end:,}"
