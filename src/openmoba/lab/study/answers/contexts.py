"""What the loss along a window says: whether context counts, how far back, and what MoBA loses there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from openmoba.lab.arms import FULL, MOBA
from openmoba.lab.measure.resample import Difference
from openmoba.lab.study.compare import behind, difference, gain, mean_loss, seed_noise
from openmoba.lab.study.groups import by, largest, of_kind
from openmoba.lab.study.outcomes import Cut, Named, Outcome
from openmoba.lab.study.words import inside, listed, nats, size_name, span, verdict


def context_in_short(outcomes: Sequence[Outcome]) -> str:
    """Say of one arm at which sizes its loss falls along the window, and at which it still does so far away."""
    sizes = [own for own in by("size", outcomes).values() if len(own[0].ranges) > 2]
    if not sizes:
        return ""
    names, last = [size_name(own[0]) for own in sizes], len(sizes[0][0].ranges) - 1
    falls = ([_falls(gain(own, last, start)) for own in sizes] for start in (0, last // 2))
    whole, half = (_fall(names, does) for does in falls)
    return (
        f"In short, {inside(outcomes[0].label)} with {listed(names)} parameters: from the window's start to its end "
        f"the loss {whole}, from its middle to its end it {half}."
    )


def gained(own: Sequence[Outcome]) -> str:
    """Say whether one arm of one size uses its context: at all, and far away."""
    last = len(own[0].ranges) - 1
    near, far = gain(own, last, 0), gain(own, last, last // 2)
    first, middle, end = (span(own[0], number) for number in (0, last // 2, last))
    return (
        f"{size_name(own[0])}: the loss at positions {end} is {nats(near)} from that at {first}: context "
        f"{_counts(near)}. From that at {middle} it is {nats(far)}: the second half of the window {_counts(far)} "
        f"({behind(own, last)}; the text differs from range to range, which the intervals hold)."
    )


def use_of_context(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say how the loss changes along a window: that of full attention, and how far MoBA is from it.

    The first only where the context was not cut short: `reach` then says what context is good for, on the same text.
    """
    runs = largest(outcomes)
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    if len(by("arm", outcomes)) == 1 or not full or len(full[0].ranges) < 3:
        return
    last, label = len(full[0].ranges) - 1, inside(full[0].label)
    end, before = (span(full[0], number) for number in (last, 1))
    if not full[0].contexts:
        yield (
            f"{size_name(full[0])}: with {label} the loss at positions {end} differs from that at {before} by "
            f"{nats(gain(full, last, 1))}, text that differs from range to range included."
        )
    more = difference(moba, full, (last, 1), seed_noise(runs, (last, 1)))
    ends = [found.mean for number in (1, last) if (found := difference(moba, full, number))]
    if more is not None and more.interval is not None:
        yield (
            f"{size_name(full[0])}: the difference of {moba[0].label} from {label} goes from {ends[0]:+.4f} nats at "
            f"positions {before} to {ends[1]:+.4f} at {end}, a change of {nats(more)}, {verdict(more)} "
            f"({behind(moba, last, len(more.per_seed))})."
        )


def reach(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say of every arm and size with how many tokens in sight it does best, where the context was cut short."""
    for runs in by("size", outcomes).values():
        for own in by("arm", runs).values():
            if own[0].contexts and own[0].has("trailing"):
                yield _reach(own)


def _reach(own: Sequence[Outcome]) -> str:
    first, (*_, farthest) = own[0], own[0].contexts
    kinds: list[Named | Cut] = ["trailing", *map(Cut, first.contexts)]
    best = min(kinds, key=lambda kind: mean_loss(own, kind))
    seen = first.config.data.length if best == "trailing" else best.context  # type: ignore[union-attr]
    told = f"{size_name(first)}, {first.label}: the last {first.config.trailing:,} tokens have their lowest loss with "
    if best == "trailing":
        found = gain(own, "trailing", Cut(farthest))
        return (
            f"{told}all {seen:,} tokens in sight. It is {nats(found)} from that with {farthest:,}: what lies farther "
            f"back {_counts(found)} ({behind(own, 'trailing')})."
        )
    found = gain(own, "trailing", best)
    harm = "does harm" if found.resolved else "is not seen to count"
    return (
        f"{told}{seen:,} tokens in sight. With all {first.config.data.length:,} it is {nats(found)} from that: what "
        f"lies farther back {harm} ({behind(own, 'trailing')})."
    )


def _fall(names: Sequence[str], falls: Sequence[bool]) -> str:
    """Say at which sizes a loss falls."""
    some = [name for name, does in zip(names, falls, strict=True) if does]
    if not some:
        return "is not seen to fall"
    return "falls" if all(falls) else f"falls with {listed(some)} alone"


def _counts(found: Difference) -> str:
    return "counts" if _falls(found) else "is not seen to count"


def _falls(found: Difference) -> bool:
    return found.resolved and found.mean < 0
