"""What power laws say: how far arms lie from full attention at equal compute, and how exponents differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openmoba.lab.arms import FULL
from openmoba.lab.measure.compute import AXES, SIX_ND
from openmoba.lab.study.compare import behind, difference, paired_loss, seed_noise
from openmoba.lab.study.groups import by, largest, of_kind, references
from openmoba.lab.study.laws import Versus, comparable, residual, slope_difference
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.words import LOSSES, inside, listed, place, size_name, spent, word


def laws_in_short(outcomes: Sequence[Outcome], axes: Sequence[str]) -> str:
    """Say how far each arm ends from full attention at every size, at what cost, and how far its law lies from it."""
    ratios = {axis: law_ratios(outcomes, axis) for axis in axes}
    found = [one for own in ratios.values() for one in own]
    if not found:
        return ""
    line = inside(of_kind(comparable(outcomes), FULL)[0].label)
    arms: dict[str, dict[str, Versus]] = {}
    for axis, own in ratios.items():
        for one in own:
            other = inside(one.other[0].label)
            name = one.own[0].label + ("" if other == line else f" (against {other})")
            arms.setdefault(name, {})[axis] = one
    first = {name: next(iter(own.values())) for name, own in arms.items()}
    sizes = listed(size_name(own[0]) for own in by("size", found[0].own).values())
    same = "; ".join(f"{name} {_at_equal_size(one, outcomes)}" for name, one in first.items())
    laws = "; ".join(f"{name} {listed(_law_in_short(own.get(axis)) for axis in axes)}" for name, own in arms.items())
    return (
        f"In short, trailing losses against {line}. On the same tokens, with {sizes} parameters: {same}."
        f"{_costs(line, first, axes)} Laws through these runs, at the same compute by {_heads(axes)}: {laws} (largest "
        f"residual {max(residual(*one.laws) for one in found):.1%}, {behind(found[0].own, 'trailing')})."
    )


def _at_equal_size(found: Versus, outcomes: Sequence[Outcome]) -> str:
    """Say how far the runs of one arm lie from those of another, size by size."""
    apart = []
    for size, own in by("size", found.own).items():
        other, runs = by("size", found.other)[size], by("size", outcomes)[size]
        one = difference(own, other, "trailing", seed_noise(runs, "trailing"))
        assert one is not None, "laws are of shared seeds"
        share = one.mean / paired_loss(other, own, "trailing")
        apart.append(f"{share:+.1%}" if one.resolved else "within noise")
    return listed(apart)


def _costs(line: str, arms: dict[str, Versus], axes: Sequence[str]) -> str:
    """Say what share of the other arm's cost the largest runs of each arm take; 6ND counts no attention."""
    counted = [axis for axis in axes if axis != SIX_ND]
    if not counted:
        return ""
    told = "; ".join(f"{name} {listed(_cost_share(one, axis) for axis in counted)}" for name, one in arms.items())
    return f" Of {line}'s cost by {_heads(counted)} the largest take: {told}."


def _cost_share(found: Versus, axis: str) -> str:
    own, other = (np.mean([AXES[axis].value(run.final) for run in largest(runs)]) for runs in (found.own, found.other))
    return f"{own / other:.0%}"


def _law_in_short(found: Versus | None) -> str:
    if found is None:
        return "no law"
    return place(found.share, 0.0 not in found.interval) if found.overlap else "nothing in common"


def _heads(axes: Sequence[str]) -> str:
    return listed(AXES[axis].head for axis in axes)


def law_ratios(outcomes: Sequence[Outcome], axis: str) -> list[Versus]:
    """Compare each arm's law of the trailing loss with that of full attention, and of such with its key convolution."""
    runs = comparable(outcomes)
    full = of_kind(runs, FULL)
    pairs = [(own, other) for own in by("arm", runs).values() if own != full for other in references(own, runs)]
    return [found for own, other in pairs if (found := Versus.of(own, other, "trailing", axis))]


def law_ratio(found: Versus, axis: str) -> str:
    """Say how far one arm's law lies from another's, at the most compute that both have spent."""
    own, other, runs = found.own[0].label, inside(found.other[0].label), behind(found.own, "trailing")
    if not found.overlap:
        (start, end), (other_start, other_end) = found.ranges
        unit, form = AXES[axis].unit, AXES[axis].form
        return (
            f"By {AXES[axis].head} there is no ratio: the runs of {own} spent {start:{form}} to {end:{form}} {unit}, "
            f"those of {other} {other_start:{form}} to {other_end:{form}}, and no amount is common to both."
        )
    low, high = found.interval.low, found.interval.high
    return (
        f"At {spent(axis, found.compute)}, the most that both have spent, the trailing loss of {own} lies "
        f"{found.share:+.2%} [{low:+.2%}, {high:+.2%}] from that of {other}: "
        f"{word(0.0 not in found.interval, found.seeds_known)} (laws of {found.runs} runs each, largest residual "
        f"{residual(*found.laws):.1%}; {runs})."
    )


def slopes(own: Sequence[Outcome], full: Sequence[Outcome], axis: str) -> Iterator[str]:
    """Say how an arm's exponent differs from that of full attention, by loss, where their runs overlap in compute.

    Args:
        own, full: runs of two arms, as `comparable` gives them.
    """
    for kind, name in LOSSES.items():
        found = Versus.of(own, full, kind, axis)
        if found and found.overlap:
            apart = slope_difference(*found.laws)
            yield (
                f"{name[:1].upper()}{name[1:]}: {own[0].label}'s exponent minus that of {inside(full[0].label)}, over "
                f"{found.runs} runs each, lies in {apart.low:+.4f} to {apart.high:+.4f}: "
                f"{word(0.0 not in apart, found.seeds_known)} (largest residual {residual(*found.laws):.1%})."
            )
