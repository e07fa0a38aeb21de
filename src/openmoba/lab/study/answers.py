"""What a study's numbers say, in sentences: comparisons, laws, the use of context, and one answer per stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.columns import counted
from openmoba.lab.config import RunConfig, changes
from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import Difference, SeedNoise
from openmoba.lab.study.candidates import Standing, standings
from openmoba.lab.study.fit import Fit
from openmoba.lab.study.outcomes import (
    Cut,
    Outcome,
    arms_of,
    behind,
    by,
    difference,
    fit_pair,
    gain,
    largest,
    mean_loss,
    of_kind,
    paired_loss,
    references,
    seed_noise,
    slope_difference,
)
from openmoba.lab.study.recipe import Stage
from openmoba.lab.study.words import LOSSES, in_percent, inside, nats, side, span, verdict, word

AS_GOOD = 0.5
"""Percent above full attention, at the upper end of the interval, up to which an arm counts as good as it."""
FAIR = "full attention (for arms with key convolution: full attention that has it)"
REPORTED_LAYERS = 32
"""Of the model whose layer-wise hybrids arXiv 2502.13189 shows, with 1, 3, 5 and 10 of them full."""


def answers(stage: Stage, outcomes: Sequence[Outcome], axis: str) -> list[str]:
    """Say what the runs of one stage answer to its question, each sentence with its interval.

    Args:
        outcomes: those that the stage compares, as `of_stage` gives them.
        axis: compute convention of the laws.
    """
    if any(run.run.sweep for run in outcomes):  # `sweep` says what there is to say
        return []
    if len(by("arm", outcomes)) == 1:
        return [_gained(own) for own in by("size", outcomes).values() if len(own[0].ranges) > 2]
    sentences: list[str] = []
    if stage.chart == "scaling":
        sentences = list(_law_ratios(outcomes, axis))
    for runs in by("size", outcomes).values():
        if stage.chart == "layers":
            sentences += _closing(runs)
        if stage.chart == "compare":
            sentences += _nearest(runs)
        if stage.chart == "positions":
            sentences += from_full(stage, runs)
    return sentences


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
        yield f"{first.config.model.size}, learning rate: {_best_rate(dict(sorted(rates.items())), noise)}"


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
            yield f"{own[0].run.size}: the trailing loss of {own[0].label} is {told}."


def slopes(own: Sequence[Outcome], full: Sequence[Outcome], axis: str) -> Iterator[str]:
    """Say how an arm's exponent differs from that of full attention, by loss."""
    for kind, name in LOSSES.items():
        if pair := fit_pair(own, full, kind, axis):
            found, runs = slope_difference(*pair), len(pair[0].loss)
            yield (
                f"{name[:1].upper()}{name[1:]}: {own[0].label}'s exponent minus that of {inside(full[0].label)}, over "
                f"{runs} runs each, lies in {found.low:+.4f} to {found.high:+.4f}: "
                f"{word(0.0 not in found, runs >= 2 * _common_sizes(own, full))}."
            )


def reach(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say of every arm and size how far back it is seen to look, where the context was cut short."""
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
                        f"{run.run.size}, {run.label}, seed {run.run.seed}: the attention changes after step {step:,}. "
                        f"Training loss of the {around[0]:,} steps before and after it: {around[1]}{same}."
                    )


def use_of_context(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say what full attention gains from a longer context, and how much of it MoBA does not."""
    runs = largest(outcomes)
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    if len(by("arm", outcomes)) == 1 or not full or len(full[0].ranges) < 3:
        return
    last = len(full[0].ranges) - 1
    end, before = (span(full[0], number) for number in (last, 1))
    found = gain(full, last, 1)
    yield (
        f"Use of context: with {inside(full[0].label)} ({full[0].run.size}) the loss at positions {end} differs from "
        f"that at {before} by {nats(found)}, text that differs from range to range included. The "
        "lower, the more the model gains from far context, and the more it can lose by leaving blocks out."
    )
    lost = difference(moba, full, (last, 1), seed_noise(runs, (last, 1)))
    if lost is not None and lost.interval is not None:
        yield (
            f"On the same text: from {before} to {end} the difference of {moba[0].label} from {inside(full[0].label)} "
            f"changes by {nats(lost)} ({behind(moba, last, len(lost.per_seed))}): {verdict(lost)}. What lies above "
            f"zero is what {inside(full[0].label)} gains from far context and {moba[0].label} does not."
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


def _gained(own: Sequence[Outcome]) -> str:
    """Say whether one arm of one size uses its context: at all, and far away."""
    last = len(own[0].ranges) - 1
    near, far = gain(own, last, 0), gain(own, last, last // 2)
    first, middle, end = (span(own[0], number) for number in (0, last // 2, last))
    return (
        f"{own[0].run.size}: the loss at positions {end} is {nats(near)} from that at {first}: context "
        f"{_counts(near)}. From that at {middle} it is {nats(far)}: the second half of the window {_counts(far)} "
        f"({behind(own, last)}; the text differs from range to range, which the intervals hold)."
    )


def _reach(own: Sequence[Outcome]) -> str:
    first, (*cuts, farthest) = own[0], own[0].contexts
    gains = [f"{nats(gain(own, 'trailing', Cut(cut)))} from that with {cut:,}" for cut in (*cuts, farthest)]
    return (
        f"{first.run.size}, {first.label}, the same last {first.config.trailing:,} tokens of every window: with all "
        f"{first.config.data.length:,} tokens in sight their loss is {', '.join(gains)}. What lies farther back than "
        f"{farthest:,} {_counts(gain(own, 'trailing', Cut(farthest)))} ({behind(own, 'trailing')})."
    )


def _counts(found: Difference) -> str:
    return "counts" if found.resolved and found.mean < 0 else "is not seen to count"


@dataclass(frozen=True)
class _Ratio:
    """How far an arm's law lies from that of full attention, at the most compute that both have spent.

    Attributes:
        share: of the law of full attention, with the ends of its interval.
        begins: compute of the smallest run of the arm that begins later.
    """

    own: Sequence[Outcome]
    other: Sequence[Outcome]
    pair: tuple[Fit, Fit]
    share: float
    low: float
    high: float
    compute: float
    begins: float

    @property
    def resolved(self) -> bool:
        return not self.low <= 0 <= self.high


def _law_ratios(outcomes: Sequence[Outcome], axis: str) -> Iterator[str]:
    """Say how far each arm's law lies from that of full attention, in short and with intervals.

    An arm with key convolution is compared with full attention that has it, too.
    """
    full = of_kind(outcomes, FULL)
    arms = [own for own in by("arm", outcomes).values() if own != full]
    ratios = [found for own in arms for other in references(own, outcomes) if (found := _ratio(own, other, axis))]
    if ratios:
        shown = (f"{one.own[0].label} {side(one.share, one.resolved)} {inside(one.other[0].label)}" for one in ratios)
        last = ratios[-1]
        sizes = counted(_common_sizes(last.own, last.other), "size")
        yield (
            f"In short, trailing losses at equal compute ({axis}), the most that both have spent: {', '.join(shown)} "
            f"({sizes}, {behind(last.own, 'trailing')})."
        )
    yield from (_law_ratio(one, axis) for one in ratios)


def _ratio(own: Sequence[Outcome], other: Sequence[Outcome], axis: str) -> _Ratio | None:
    pair = fit_pair(own, other, "trailing", axis)
    if pair is None:
        return None
    compute = min(float(law.compute.max()) for law in pair)
    begins = max(float(law.compute.min()) for law in pair)
    share = float(pair[0].law(compute) / pair[1].law(compute)) - 1
    low, high = (float(end[0]) - 1 for end in pair[0].ratio(pair[1], [compute]))
    return _Ratio(own, other, pair, share, low, high, compute, begins)


def _law_ratio(found: _Ratio, axis: str) -> str:
    sizes, runs = _common_sizes(found.own, found.other), len(found.pair[0].loss)
    unchecked = " Two sizes make a law that nothing checks." if sizes == 2 else ""
    beyond = f", beyond the runs of one of them, which begin at {AXES[axis].amount(found.begins)}"
    return (
        f"At an equal {AXES[axis].amount(found.compute)} ({axis}{'' if found.begins <= found.compute else beyond}) the "
        f"trailing loss of {found.own[0].label} lies {found.share:+.2%} [{found.low:+.2%}, {found.high:+.2%}] from "
        f"that of {inside(found.other[0].label)}, by the laws of {runs} runs each ({behind(found.own, 'trailing')}): "
        f"{word(found.resolved, runs >= 2 * sizes)}.{unchecked}"
    )


def _common_sizes(own: Sequence[Outcome], other: Sequence[Outcome]) -> int:
    return len({run.run.size for run in own} & {run.run.size for run in other})


def _closing(runs: Sequence[Outcome]) -> Iterator[str]:
    """Say how much of the gap between MoBA and full attention the hybrids close, and what is left of it."""
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    noise = seed_noise(runs, "trailing")
    gap = difference(moba, full, "trailing", noise)
    if full and not full[0].has("trailing"):
        return
    left = [(own, found) for own in arms_of(runs, HYBRID) if (found := difference(own, full, "trailing", noise))]
    shown = [f"MoBA in every layer {_from(gap, full, moba)}"] if gap else []
    shown += [f"with {_full_layers(own[0])} {_from(found, full, own)}" for own, found in left]
    if shown:
        yield f"In short, trailing losses of {runs[0].run.size}: {', '.join(shown)} ({behind(runs, 'trailing')})."
    if gap is not None:
        base = paired_loss(full, moba, "trailing")
        yield (
            f"{runs[0].run.size}: {moba[0].label} in every layer costs {nats(gap)} ({in_percent(gap, base)}) in "
            f"trailing loss ({behind(moba, 'trailing', len(gap.per_seed))}): {verdict(gap)}."
        )
    for own, found in left:
        gains = gap is not None and gap.resolved and gap.mean > 0
        closed = f", {1 - found.mean / gap.mean:.0%} of the gap closed" if gap and gains else ""
        share = in_percent(found, paired_loss(full, own, "trailing"))
        layers, count = own[0].layers, len(own[0].full_layers)
        of = f"{count / layers:.0%}; " if layers else ""
        yield (
            f"With {_full_layers(own[0])} ({of}{own[0].label}): {nats(found)} ({share}) "
            f"from {inside(full[0].label)}{closed}: {verdict(found)}."
        )
    if full and any(run.layers and run.layers != REPORTED_LAYERS for run in runs):
        yield (
            f"The hybrids of the MoBA report have 1, 3, 5 and 10 full layers of {REPORTED_LAYERS}, 3% to 31%: compare "
            "shares of layers, not counts."
        )


def _full_layers(run: Outcome) -> str:
    return f"{len(run.full_layers)}{f' of {run.layers}' if run.layers else ''} layers full"


def _from(found: Difference, full: Sequence[Outcome], own: Sequence[Outcome]) -> str:
    """Say how far an arm ends from full attention, without an interval."""
    share = found.mean / paired_loss(full, own, "trailing")
    return f"{side(share, found.resolved)} {inside(full[0].label)}"


def _nearest(runs: Sequence[Outcome]) -> Iterator[str]:
    """Say what the sparse candidate with the lowest trailing loss is, and name those that are not told apart from it.

    Then those that are as good as full attention, and the one with the fewest keys that is not resolved above it.
    """
    sparse = [found for found in standings(runs) if found.key_share is not None and found.key_share < 1]
    sparse = [found for found in sparse if found.plain.trailing is not None]
    if not sparse:
        return
    best, *others = sparse
    yield _in_short(best)
    which = (
        f"the lowest trailing loss of {len(sparse)} sparse candidates is that of" if others else "one sparse candidate,"
    )
    yield f"{runs[0].run.size}: {which} {_stands(best)}."
    noise = seed_noise(runs, "trailing")
    against = [(one, difference(one.runs, best.runs, "trailing", noise)) for one in others]
    alike = [f"{one.runs[0].label} ({nats(found)})" for one, found in against if found and not found.resolved]
    if others:
        yield f"Not told apart from {best.runs[0].label}: {', '.join(alike) or 'none of the others'}."
    if unfair := [one.runs[0].label for one in sparse if one.fair is None]:
        yield (
            f"{', '.join(unfair)}: full attention with the same key convolution has no run yet, so what comes of the "
            "choice of blocks is not known."
        )
    every = "All others" if unfair else "All"
    yield from _level([one for one in sparse if one.fair is not None and one.fair.trailing is not None], every)


def _level(judged: Sequence[Standing], every: str) -> Iterator[str]:
    """Say which of the candidates are as good as full attention, and which are resolved above it.

    Args:
        judged: those that have a fair comparison; `every`: what they are called together.
    """
    if not judged:
        return
    good = [_as_good(one) for one in judged if _at_most(one, AS_GOOD)]
    yield f"At most {AS_GOOD:g}% above {FAIR} at the upper end of the interval: {', '.join(good) or 'none'}."
    level = [one for one in judged if one.fair and one.fair.trailing and not _resolved_above(one.fair.trailing)]
    fewest = min(level, key=lambda found: found.key_share or 0, default=None)
    if fewest is None:
        yield f"{every} are resolved above {FAIR}."
    elif len(level) == 1 < len(judged):
        yield f"{every} but {fewest.runs[0].label} are resolved above {FAIR}."
    elif len(level) > 1:
        yield (
            f"{len(level)} are not resolved above {FAIR}, which does not make them equal; the one of these that reads "
            f"the fewest keys is {_stands(fewest)}."
        )


def _in_short(found: Standing) -> str:
    """Say of a sparse candidate what it is, what it saves and what it loses, in a sentence without intervals."""
    run, against = found.runs[0], found.fair or found.plain
    settings = run.config.arm.settings(run.layers, run.config.train.steps)
    full = "full attention" + (" with the same key convolution" if against is found.own else "")
    full += " without its key convolution" if found.fair is None else ""
    trailing = against.trailing
    assert trailing is not None, "chosen by it"
    end = side(trailing.mean / against.trailing_loss, trailing.resolved)
    fast = "" if found.speedup is None else f", trains {found.speedup:.1f} times as fast"
    return (
        f"In short: {run.label} ({settings}) reads {found.key_share:.0%} of the keys that full attention reads{fast}, "
        f"and its trailing loss ends {end} that of {full}."
    )


def _stands(found: Standing) -> str:
    """Say how far an arm is from full attention, from that of the same key convolution, and what it costs."""
    parts = []
    for against, name in ((found.plain, ""), (found.own, ", full attention with the same key convolution")):
        if against is not None and against.trailing is not None:
            trailing = against.trailing
            shown = f"{nats(trailing)} ({in_percent(trailing, against.trailing_loss)})"
            parts.append(f"{shown} from {inside(against.name)}{name}: {verdict(trailing)}")
    costs = [] if found.key_share is None else [f"{found.key_share:.1%} of the keys read"]
    costs += [] if found.speedup is None else [f"{found.speedup:.2f} times the tokens per second"]
    cost = f", with {' and '.join(costs)}" if costs else ""
    return f"{found.runs[0].label}: {'; '.join(parts)}{cost} ({behind(found.runs, 'trailing')})"


def _as_good(found: Standing) -> str:
    assert found.fair is not None, "chosen by it"
    assert found.fair.trailing is not None
    trailing, loss = found.fair.trailing, found.fair.trailing_loss
    return f"{found.runs[0].label} ({in_percent(trailing, loss)}, {found.key_share:.1%} of the keys)"


def _at_most(found: Standing, percent: float) -> bool:
    trailing = found.fair and found.fair.trailing
    if found.fair is None or not trailing or trailing.interval is None:
        return False
    return 100 * trailing.interval.high / found.fair.trailing_loss <= percent


def _resolved_above(found: Difference) -> bool:
    return found.mean > 0 and found.resolved
