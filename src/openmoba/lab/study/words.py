"""How a study writes differences, and which of them it calls resolved."""

from __future__ import annotations

from openmoba.lab.measure.resample import Difference, Interval
from openmoba.lab.study.outcomes import Named, Outcome

LOSSES: dict[Named, str] = {"lm": "LM loss", "trailing": "trailing loss"}


def inside(label: str) -> str:
    """Write an arm's name inside a sentence: "Full attention" loses its capital, "MoBA" keeps it."""
    return label[:1].lower() + label[1:] if label[1:].islower() else label


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


def side(share: float, resolved: bool) -> str:
    """Say how far a difference lies from what follows, without an interval: "1.2% above", or "within noise of"."""
    return f"{abs(share):.1%} {'below' if share < 0 else 'above'}" if resolved else "within noise of"


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
