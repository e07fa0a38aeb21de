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
from openmoba.lab.study.words import LOSSES, inside, listed, place, place_before, size_name, spent, word


def laws_in_short(outcomes: Sequence[Outcome], axes: Sequence[str]) -> str:
    """Say how far each arm's largest runs end from full attention, at what cost, and how far its law lies from it."""
    found = [(axis, one) for axis in axes for one in law_ratios(outcomes, axis)]
    if not found:
        return ""
    arms: dict[tuple[str, str], dict[str, Versus]] = {}
    for axis, one in found:
        arms.setdefault((one.own[0].label, inside(one.other[0].label)), {})[axis] = one
    told = " ".join(_arm_in_short(*names, laws, outcomes, axes) for names, laws in arms.items())
    return (
        f"In short, trailing losses on the same tokens ({behind(found[0][1].own, 'trailing')}). {told} The largest "
        f"residual of these laws is {max(residual(*one.laws) for _, one in found):.1%}."
    )


def _arm_in_short(
    name: str, line: str, laws: dict[str, Versus], outcomes: Sequence[Outcome], axes: Sequence[str]
) -> str:
    """Say of one arm where its runs end, what the largest cost, and where its law lies by each axis.

    Args:
        line: the arm that it is compared with.
        laws: by axis. 6ND counts no attention, so it is no cost.
    """
    first = next(iter(laws.values()))
    shares = [f"{_cost_share(first, axis)} by {AXES[axis].head}" for axis in axes if axis != SIX_ND]
    cost = f" Of {line}'s cost the largest takes {listed(shares)}." if shares else ""
    places = listed(f"{_law_in_short(laws.get(axis))} by {AXES[axis].head}" for axis in axes)
    return f"{name} {_ends(first, line, outcomes)}.{cost} Its law at the same compute: {places}."


def _ends(found: Versus, line: str, outcomes: Sequence[Outcome]) -> str:
    """Say how far the largest runs of one arm end from those of another, and on which side the smaller ones do."""
    *smaller, (size, share, resolved) = _at_equal_size(found, outcomes)
    sides: dict[str, list[str]] = {}
    for name, apart, told_apart in smaller:
        sides.setdefault(_side(apart, told_apart), []).append(name)
    others = "; ".join(f"{side} it with {listed(names)}" for side, names in sides.items())
    return f"ends {place_before(share, resolved)} {line} with {size} parameters, and {others}"


def _at_equal_size(found: Versus, outcomes: Sequence[Outcome]) -> Iterator[tuple[str, float, bool]]:
    """Yield how far the runs of one arm lie from those of another by size, as a share, and whether it is resolved."""
    for size, own in by("size", found.own).items():
        other, runs = by("size", found.other)[size], by("size", outcomes)[size]
        one = difference(own, other, "trailing", seed_noise(runs, "trailing"))
        assert one is not None, "laws are of shared seeds"
        yield size_name(own[0]), one.mean / paired_loss(other, own, "trailing"), one.resolved


def _side(share: float, resolved: bool) -> str:
    return ("below" if share < 0 else "above") if resolved else "within noise of"


def _cost_share(found: Versus, axis: str) -> str:
    own, other = (np.mean([AXES[axis].value(run.final) for run in largest(runs)]) for runs in (found.own, found.other))
    return f"{own / other:.0%}"


def _law_in_short(found: Versus | None) -> str:
    if found is None:
        return "no law"
    return place(found.share, 0.0 not in found.interval) if found.overlap else "no compute in common"


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
