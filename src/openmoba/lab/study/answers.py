"""What a study's numbers say, in sentences: one answer per stage, then comparisons, laws and the use of context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.config import RunConfig, changes
from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import Difference, SeedNoise
from openmoba.lab.study.candidates import Standing, standings
from openmoba.lab.study.laws import Versus, comparable, residual, slope_difference
from openmoba.lab.study.outcomes import (
    Cut,
    Named,
    Outcome,
    arms_of,
    behind,
    by,
    difference,
    gain,
    largest,
    mean_loss,
    of_kind,
    paired_loss,
    references,
    seed_noise,
)
from openmoba.lab.study.recipe import Stage
from openmoba.lab.study.words import (
    LOSSES,
    in_percent,
    inside,
    listed,
    nats,
    place,
    size_name,
    span,
    spent,
    verdict,
    word,
)

AS_GOOD = 0.5
"""Percent above full attention, at the upper end of the interval, up to which an arm counts as good as it."""
FAIR = "full attention (for arms with key convolution: full attention that has it)"
REPORTED_LAYERS = 32
"""Of the model whose layer-wise hybrids arXiv 2502.13189 shows, with 1, 3, 5 and 10 of them full."""


def in_short(stage: Stage, outcomes: Sequence[Outcome], axes: Sequence[str]) -> str:
    """Say the answer to a stage's question in short, without intervals; "" where there is none yet.

    Args:
        outcomes: those that the stage compares, as `of_stage` gives them.
        axes: conventions of compute by which laws are compared.
    """
    if any(run.run.sweep for run in outcomes):  # `sweep` says what there is to say
        return ""
    if len(stage.arms) == 1:
        return _context_in_short(outcomes)
    if stage.chart == "scaling":
        return _laws_in_short(outcomes, axes)
    runs = largest(outcomes)
    if stage.chart == "layers":
        return _layers_in_short(runs)
    sparse = _sparse(runs) if stage.chart == "compare" else []
    return _best_in_short(sparse[0]) if sparse else ""


def details(stage: Stage, outcomes: Sequence[Outcome], axes: Sequence[str]) -> list[str]:
    """Say what stands behind the answer of a stage, each number with its interval; arguments as of `in_short`."""
    if any(run.run.sweep for run in outcomes):
        return []
    sizes = by("size", outcomes).values()
    if len(by("arm", outcomes)) == 1:
        return [_gained(own) for own in sizes if len(own[0].ranges) > 2]
    if stage.chart == "scaling":
        return [_law_ratio(one, axis) for axis in axes for one in _law_ratios(outcomes, axis)]
    if stage.chart == "positions":
        return [sentence for runs in sizes for sentence in from_full(stage, runs)]
    told = _closing if stage.chart == "layers" else _nearest
    return [sentence for runs in sizes for sentence in told(runs)]


def sweep(stage: Stage, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Name the best learning rate of every model in a stage that is a sweep, and how far the others are from it.

    Rates are compared over the seeds that all of them have; what seeds a rate has beyond say how large their noise is.

    Args:
        outcomes: of the whole study, other stages too: runs that differ from one of the sweep's in nothing but the rate
            and the seed belong to it.
    """
    own, told = [run for run in outcomes if run.run.stage == stage and run.run.sweep], set[str]()
    for first in own:
        if first.run.name in told:
            continue
        rates: dict[float, list[Outcome]] = {}
        for run in outcomes:
            if not changes(first.config, _at_rate_and_seed_of(first, run)):
                rates.setdefault(run.config.train.learning_rate, []).append(run)
                told.add(run.run.name)
        noise = SeedNoise.of([run.loss("lm") for run in runs] for runs in rates.values())
        yield f"{size_name(first)}, learning rate: {_best_rate(dict(sorted(rates.items())), noise)}"


def _at_rate_and_seed_of(first: Outcome, run: Outcome) -> RunConfig:
    """Return the configuration of `run` with the learning rate and the seed of `first`."""
    train = first.config.train
    return replace(run.config, train=replace(run.config.train, learning_rate=train.learning_rate, seed=train.seed))


def _best_rate(rates: dict[float, list[Outcome]], noise: SeedNoise | None) -> str:
    """Say which of the rates, in rising order, has the lowest loss, how far the others are, and of which runs."""
    shared = set.intersection(*({run.run.seed for run in runs} for runs in rates.values()))
    if not shared:
        return f"{' and '.join(f'{rate:g}' for rate in rates)} have no seed in common, so none of them is the best."
    rates = {rate: [run for run in runs if run.run.seed in shared] for rate, runs in rates.items()}
    best = min(rates, key=lambda rate: mean_loss(rates[rate], "lm"))
    others = [
        f"{rate:g} is {nats(found)} from it, {verdict(found)}"
        for rate in rates
        if rate != best and (found := difference(rates[rate], rates[best], "lm", noise))
    ]
    ends = {min(rates): ("lowest", "lower"), max(rates): ("highest", "higher")} if others else {}
    beyond = "It is the {} of these rates: a {} one may be better still. ".format(*ends[best]) if best in ends else ""
    names = ", ".join(run.run.name for runs in rates.values() for run in runs)
    return (
        f"{best:g} has the lowest LM loss, {mean_loss(rates[best], 'lm'):.4f} nats; "
        f"{'; '.join(others) or 'no other rate is measured yet'} ({behind(rates[best], 'lm')}). {beyond}Runs: {names}."
    )


def from_full(stage: Stage, runs: Sequence[Outcome]) -> Iterator[str]:
    """Say how far the stage's own arms are from full attention in trailing loss, and from MoBA."""
    moba = of_kind(runs, MOBA)
    noise = seed_noise(runs, "trailing")
    for own in by("arm", (run for run in runs if run.run.stage == stage)).values():
        full, parts = references(own, runs), []
        for other in (*full, moba) if own[0].config.arm.kind is not FULL else full:
            found = difference(own, other, "trailing", noise) if other and own != other else None
            if found is not None:
                base = paired_loss(other, own, "trailing")
                shown = f"{nats(found)} ({in_percent(found, base)})"
                parts.append(f"{shown} from {inside(other[0].label)}, {verdict(found)}")
        if parts:
            told = f"{'; '.join(parts)} ({behind(own, 'trailing')})"
            yield f"{size_name(own[0])}: the trailing loss of {own[0].label} is {told}."


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


def reach(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say of every arm and size with how many tokens in sight it does best, where the context was cut short."""
    for runs in by("size", outcomes).values():
        for own in by("arm", runs).values():
            if own[0].contexts and own[0].has("trailing"):
                yield _reach(own)


def switches(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say what the training loss does where an arm changes its attention, beside full attention on the same batches."""
    for runs in by("size", outcomes).values():
        full = {run.run.seed: run for run in of_kind(runs, FULL)}
        for run in runs:
            moba, steps = run.config.arm.moba_steps(run.config.train.steps), run.config.train.steps
            for step in (moba.start, moba.stop):
                around = _around(run, step) if moba and 0 < step < steps else None
                if around is not None:
                    beside = _around(full[run.run.seed], step) if run.run.seed in full else None
                    same = "" if beside is None else f"; full attention on the same batches {beside[1]}"
                    yield (
                        f"{size_name(run)}, {run.label}, seed {run.run.seed}: the attention changes after step "
                        f"{step:,}. Training loss of the {around[0]:,} steps before and after it: {around[1]}{same}."
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


def _around(run: Outcome, step: int) -> tuple[int, str] | None:
    """Return a twentieth of the steps, and their training loss before and after `step`; None without records."""
    around = run.config.train.steps // 20
    before = [loss for last, loss in run.trained.items() if step - around < last <= step]
    after = [loss for last, loss in run.trained.items() if step < last <= step + around]
    if not before or not after:
        return None
    first, second = (sum(losses) / len(losses) for losses in (before, after))
    return around, f"{first:.4f} and {second:.4f} nats ({second - first:+.4f}), {max(after):.4f} in its highest record"


def _context_in_short(outcomes: Sequence[Outcome]) -> str:
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


def _fall(names: Sequence[str], falls: Sequence[bool]) -> str:
    """Say at which sizes a loss falls."""
    some = [name for name, does in zip(names, falls, strict=True) if does]
    if not some:
        return "is not seen to fall"
    return "falls" if all(falls) else f"falls with {listed(some)} alone"


def _gained(own: Sequence[Outcome]) -> str:
    """Say whether one arm of one size uses its context: at all, and far away."""
    last = len(own[0].ranges) - 1
    near, far = gain(own, last, 0), gain(own, last, last // 2)
    first, middle, end = (span(own[0], number) for number in (0, last // 2, last))
    return (
        f"{size_name(own[0])}: the loss at positions {end} is {nats(near)} from that at {first}: context "
        f"{_counts(near)}. From that at {middle} it is {nats(far)}: the second half of the window {_counts(far)} "
        f"({behind(own, last)}; the text differs from range to range, which the intervals hold)."
    )


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


def _counts(found: Difference) -> str:
    return "counts" if _falls(found) else "is not seen to count"


def _falls(found: Difference) -> bool:
    return found.resolved and found.mean < 0


def _law_ratios(outcomes: Sequence[Outcome], axis: str) -> list[Versus]:
    """Compare each arm's law of the trailing loss with that of full attention, and of such with its key convolution."""
    runs = comparable(outcomes)
    full = of_kind(runs, FULL)
    pairs = [(own, other) for own in by("arm", runs).values() if own != full for other in references(own, runs)]
    return [found for own, other in pairs if (found := Versus.of(own, other, "trailing", axis))]


def _laws_in_short(outcomes: Sequence[Outcome], axes: Sequence[str]) -> str:
    """Say how far each arm ends from full attention at every size, at what cost, and how far its law lies from it."""
    ratios = {axis: _law_ratios(outcomes, axis) for axis in axes}
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
    counted = [axis for axis in axes if axis != "6nd"]
    told = [f"{name} {listed(_cost_share(one, axis) for axis in counted)}" for name, one in arms.items() if counted]
    return f" Of {line}'s cost by {_heads(counted)} the largest take: {'; '.join(told)}." if told else ""


def _cost_share(found: Versus, axis: str) -> str:
    own, other = (np.mean([AXES[axis].value(run.final) for run in largest(runs)]) for runs in (found.own, found.other))
    return f"{own / other:.0%}"


def _law_in_short(found: Versus | None) -> str:
    if found is None:
        return "no law"
    return place(found.share, 0.0 not in found.interval) if found.overlap else "nothing in common"


def _heads(axes: Sequence[str]) -> str:
    return listed(AXES[axis].head for axis in axes)


def _law_ratio(found: Versus, axis: str) -> str:
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


def _layers_in_short(runs: Sequence[Outcome]) -> str:
    """Say how far MoBA and each hybrid end from full attention."""
    full, moba, noise = of_kind(runs, FULL), of_kind(runs, MOBA), seed_noise(runs, "trailing")
    named = [("MoBA in every layer", moba), *((f"with {_full_layers(own[0])}", own) for own in arms_of(runs, HYBRID))]
    found = [(name, own, one) for name, own in named if (one := difference(own, full, "trailing", noise))]
    if not found:
        return ""
    shown = [f"{name} {place(one.mean / paired_loss(full, own, 'trailing'), one.resolved)}" for name, own, one in found]
    return (
        f"In short, trailing losses of a model of {size_name(runs[0])} parameters against {inside(full[0].label)}: "
        f"{', '.join(shown)} ({behind(runs, 'trailing')})."
    )


def _closing(runs: Sequence[Outcome]) -> Iterator[str]:
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


def _sparse(runs: Sequence[Outcome]) -> list[Standing]:
    """Return the candidates that read fewer keys than full attention, that of the lowest trailing loss first."""
    sparse = [found for found in standings(runs) if found.key_share is not None and found.key_share < 1]
    return [found for found in sparse if found.plain.trailing is not None]


def _best_in_short(found: Standing) -> str:
    """Say of a sparse candidate what it is, what it saves and what it loses."""
    run, against = found.runs[0], found.fair or found.plain
    settings = run.config.arm.settings(run.layers, run.config.train.steps)
    full = "full attention with the same key convolution" if against is found.own else inside(against.name)
    full += " without its key convolution" if found.fair is None else ""
    trailing = against.trailing
    assert trailing is not None, "chosen by it"
    where = place(trailing.mean / against.trailing_loss, trailing.resolved)
    end = f"{where} that of" if trailing.resolved else f"{where} of that of"
    fast = "" if found.speedup is None else f", trains {found.speedup:.1f} times as fast"
    return (
        f"In short: {run.label} ({settings}) reads {found.key_share:.0%} of the keys that full attention reads{fast}, "
        f"and its trailing loss ends {end} {full} ({size_name(run)} parameters, {behind(found.runs, 'trailing')})."
    )


def _nearest(runs: Sequence[Outcome]) -> Iterator[str]:
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
