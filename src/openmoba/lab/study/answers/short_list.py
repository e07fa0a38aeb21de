"""What a short list says: which candidates are as good as full attention, and which of them reads least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from openmoba.lab.measure.resample import Difference
from openmoba.lab.study.candidates import Standing, standings
from openmoba.lab.study.compare import behind, difference, seed_noise
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.words import inside, nats, place_before, size_name

AS_GOOD = 0.5
"""Percent above full attention, at the upper end of the interval, up to which an arm counts as good as it."""
FAIR = "full attention (for arms with key convolution: full attention that has it)"


def best_in_short(runs: Sequence[Outcome]) -> str:
    """Say of the sparse candidate with the lowest trailing loss what it is, what it saves and what it loses."""
    sparse = _sparse(runs)
    return _short(sparse[0]) if sparse else ""


def _short(found: Standing) -> str:
    run, against = found.runs[0], found.fair or found.plain
    settings = run.config.arm.settings(run.layers, run.config.train.steps)
    full = "full attention with the same key convolution" if against is found.own else inside(against.name)
    full += " without its key convolution" if found.fair is None else ""
    trailing = against.trailing
    assert trailing is not None, "chosen by it"
    where = place_before(trailing.mean / against.trailing_loss, trailing.resolved)
    fast = "" if found.speedup is None else f", trains {found.speedup:.1f} times as fast"
    return (
        f"In short, {run.label} reads {found.key_share:.0%} of the keys that full attention reads{fast}, and its "
        f"trailing loss ends {where} that of {full}. Its setting: {settings}. Measured with {size_name(run)} "
        f"parameters, {behind(found.runs, 'trailing')}."
    )


def nearest(runs: Sequence[Outcome]) -> Iterator[str]:
    """Name the sparse candidate with the lowest trailing loss, and those that are not told apart from it.

    Then those that are as good as full attention, and the one with the fewest keys that is not resolved above it. The
    numbers stand in the table of candidates.
    """
    sparse = _sparse(runs)
    if not sparse:
        return
    best, *others = sparse
    noise = seed_noise(runs, "trailing")
    against = [(one, difference(one.runs, best.runs, "trailing", noise)) for one in others]
    alike = [f"{one.runs[0].label} ({nats(found)})" for one, found in against if found and not found.resolved]
    if others:
        yield (
            f"{size_name(runs[0])}: {best.runs[0].label} has the lowest trailing loss of {len(sparse)} sparse "
            f"candidates. Not told apart from it: {', '.join(alike) or 'none of the others'}."
        )
    if unfair := [one.runs[0].label for one in sparse if one.fair is None]:
        yield (
            f"{', '.join(unfair)}: full attention with the same key convolution has no run yet, so what comes of the "
            "choice of blocks is not known."
        )
    yield from _level([one for one in sparse if one.fair is not None and one.fair.trailing is not None])


def _sparse(runs: Sequence[Outcome]) -> list[Standing]:
    """Return the candidates that read fewer keys than full attention, that of the lowest trailing loss first."""
    sparse = [found for found in standings(runs) if found.key_share is not None and found.key_share < 1]
    return [found for found in sparse if found.plain.trailing is not None]


def _level(judged: Sequence[Standing]) -> Iterator[str]:
    """Say which of the candidates that have a fair comparison are as good as full attention, and which are above it."""
    if not judged:
        return
    good = [one.runs[0].label for one in judged if _at_most(one, AS_GOOD)]
    yield f"At most {AS_GOOD:g}% above {FAIR} at the upper end of the interval: {', '.join(good) or 'none'}."
    level = [one for one in judged if one.fair and one.fair.trailing and not _resolved_above(one.fair.trailing)]
    above = [one.runs[0].label for one in judged if one not in level]
    yield f"Resolved above it: {', '.join(above) or 'none'}."
    if len(level) > 1:
        fewest = min(level, key=lambda found: found.key_share or 0)
        yield (
            f"The other {len(level)} are not resolved above it, which does not make them equal to it. Of these "
            f"{fewest.runs[0].label} reads the fewest keys, {fewest.key_share:.1%}."
        )


def _at_most(found: Standing, percent: float) -> bool:
    trailing = found.fair and found.fair.trailing
    if found.fair is None or not trailing or trailing.interval is None:
        return False
    return 100 * trailing.interval.high / found.fair.trailing_loss <= percent


def _resolved_above(found: Difference) -> bool:
    return found.mean > 0 and found.resolved
