"""Tables that compare the arms of a stage: differences between them, and how far back each is seen to look."""

from __future__ import annotations

from collections.abc import Sequence

from openmoba.lab.arms import FULL, MOBA
from openmoba.lab.measure.resample import Difference
from openmoba.lab.study.compare import difference, gain, paired_loss, seed_noise
from openmoba.lab.study.groups import by, of_kind, references
from openmoba.lab.study.outcomes import Cut, Outcome
from openmoba.lab.study.words import LOSSES, bounds, in_percent, size_name
from openmoba.records.markdown import table

BOLD = "Bold where the interval excludes zero; what is not bold lies within noise."
"""What stands above these tables."""


def comparisons(outcomes: Sequence[Outcome]) -> list[str]:
    """Compare every arm with full attention, with that of its own key convolution, and with MoBA, by size and loss.

    Returns:
        A Markdown table; empty where nothing can be compared.
    """
    rows = []
    for runs in by("size", outcomes).values():
        full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
        arms = [own for own in by("arm", runs).values() if own != full]
        pairs = [(own, reference) for own in arms for reference in references(own, runs)]
        pairs += [(own, moba) for own in arms if moba and own != moba]
        rows += [row for own, reference in pairs if (row := _compared(own, reference, runs))]
    heads = ["size", "arm", "from", "seeds", *(f"{name}, nats" for name in LOSSES.values()), "trailing loss, %",
             "trailing loss by seed, nats"]  # fmt: skip
    return table(heads, rows) if rows else []


def contexts(outcomes: Sequence[Outcome]) -> list[str]:
    """Say of every arm and size what the same last tokens lose where the context is cut short.

    Returns:
        A Markdown table; empty where it was not cut.
    """
    rows, cuts = [], sorted({context for run in outcomes for context in run.contexts})
    for runs in by("size", outcomes).values():
        for own in by("arm", runs).values():
            if own[0].contexts and own[0].has("trailing"):
                lost = {context: gain(own, Cut(context), "trailing") for context in own[0].contexts}
                cells = [_cell(lost[context]) if context in lost else "" for context in cuts]
                rows.append([size_name(own[0]), own[0].label, str(len(own)), *cells])
    return table(["size", "arm", "seeds", *(f"{context:,}" for context in cuts)], rows) if rows else []


def _compared(own: Sequence[Outcome], reference: Sequence[Outcome], runs: Sequence[Outcome]) -> list[str]:
    """Return the cells of one pair of arms of a size; empty without a seed that both have."""
    found = {kind: difference(own, reference, kind, seed_noise(runs, kind)) for kind in LOSSES}
    known = [one for one in found.values() if one is not None]
    if not known:
        return []
    trailing = found["trailing"]
    by_seed = [f"{value:+.4f}" for value in trailing.per_seed] if trailing and len(trailing.per_seed) > 1 else []
    cells = ["-" if one is None else _cell(one) for one in found.values()]
    cells.append("-" if trailing is None else in_percent(trailing, paired_loss(reference, own, "trailing"), sign=""))
    return [
        size_name(own[0]),
        own[0].label,
        reference[0].label,
        str(len(known[0].per_seed)),
        *cells,
        ", ".join(by_seed),
    ]


def _cell(found: Difference) -> str:
    """Write a difference with its interval, bold if that excludes zero."""
    text = f"{found.mean:+.4f}{bounds(found.interval)}"
    return f"**{text}**" if found.resolved else text
