"""What layer-wise hybrids say: how far they end from full attention, and how much of MoBA's gap they close."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.measure.resample import Difference
from openmoba.lab.study.compare import behind, difference, paired_loss, seed_noise
from openmoba.lab.study.groups import arms_of, of_kind
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.words import in_percent, inside, nats, place, size_name, verdict

REPORTED_LAYERS = 32
"""Of the model whose layer-wise hybrids arXiv 2502.13189 shows, with 1, 3, 5 and 10 of them full."""


def layers_in_short(runs: Sequence[Outcome]) -> str:
    """Say how far MoBA and each hybrid end from full attention."""
    full, moba, noise = of_kind(runs, FULL), of_kind(runs, MOBA), seed_noise(runs, "trailing")
    named = [("MoBA in every layer", moba), *((_full_layers(own[0]), own) for own in arms_of(runs, HYBRID))]
    found = [(name, own, one) for name, own in named if (one := difference(own, full, "trailing", noise))]
    if not found:
        return ""
    shown = [
        f"{name}: {place(one.mean / paired_loss(full, own, 'trailing'), one.resolved)}." for name, own, one in found
    ]
    return (
        f"In short, trailing losses with {size_name(runs[0])} parameters against {inside(full[0].label)} "
        f"({behind(runs, 'trailing')}). {' '.join(shown)}"
    )


def closing(runs: Sequence[Outcome]) -> Iterator[str]:
    """Say how far MoBA and the hybrids end from full attention, and how much of MoBA's gap the hybrids close."""
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    noise = seed_noise(runs, "trailing")
    gap = difference(moba, full, "trailing", noise)
    if full and not full[0].has("trailing"):
        return
    if gap is not None:
        base = paired_loss(full, moba, "trailing")
        yield (
            f"{size_name(runs[0])}: {moba[0].label} in every layer costs {nats(gap)} ({in_percent(gap, base)}) in "
            f"trailing loss, {verdict(gap)} ({behind(moba, 'trailing', len(gap.per_seed))})."
        )
    for own in arms_of(runs, HYBRID):
        if found := difference(own, full, "trailing", noise):
            share = in_percent(found, paired_loss(full, own, "trailing"))
            layers, count = own[0].layers, len(own[0].full_layers)
            of = f"{count / layers:.0%}; " if layers else ""
            yield (
                f"With {_full_layers(own[0])} ({of}{own[0].label}): {nats(found)} ({share}) from "
                f"{inside(full[0].label)}, {verdict(found)}.{_closed(found, gap)}"
            )
    if full and any(run.layers and run.layers != REPORTED_LAYERS for run in runs):
        yield (
            f"The hybrids of the MoBA report have 1, 3, 5 and 10 full layers of {REPORTED_LAYERS}, 3% to 31%: compare "
            "shares of layers, not counts."
        )


def _closed(left: Difference, gap: Difference | None) -> str:
    """Say how much of MoBA's gap a hybrid closes, a share without an interval; "" where there is no gap."""
    if gap is None or not gap.resolved or gap.mean < 0:
        return ""
    share = 1 - left.mean / gap.mean
    part = "all" if share >= 1 else "none" if share <= 0 else f"about {share:.0%}"
    return f" This closes {part} of MoBA's gap."


def _full_layers(run: Outcome) -> str:
    return f"{len(run.full_layers)}{f' of {run.layers}' if run.layers else ''} layers full"
