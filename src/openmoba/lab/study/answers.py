"""What a study's numbers say, in sentences: comparisons, laws, the use of context, and one answer per stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import Difference, Interval
from openmoba.lab.study.candidates import Standing, percent, standings
from openmoba.lab.study.outcomes import (
    Cut,
    Named,
    Outcome,
    arms_of,
    behind,
    by,
    difference,
    fit_pair,
    gain,
    mean_loss,
    of_kind,
    seed_noise,
    slope_difference,
)
from openmoba.lab.study.recipe import Stage

LOSSES: dict[Named, str] = {"lm": "LM loss", "trailing": "trailing loss"}


def answers(stage: Stage, outcomes: Sequence[Outcome], axis: str) -> list[str]:
    """Say what the runs of one stage answer to its question, each sentence with its interval.

    Args:
        outcomes: those that the stage compares, as `of_stage` gives them.
        axis: compute convention of the laws.
    """
    if is_sweep(outcomes):
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
    return sentences


def is_sweep(outcomes: Sequence[Outcome]) -> bool:
    """Say whether the runs of a stage are one arm at several learning rates of the same model."""
    models = {run.run.size: run.config.model.size for run in outcomes}
    return len(by("arm", outcomes)) == 1 and len(set(models.values())) < len(models)


def sweep(stage: Stage, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Name the best learning rate of every model in a stage that is a sweep, and how far the others are from it.

    Args:
        outcomes: of the whole study, other stages too: runs of the same arm, model and tokens belong to the sweep.
    """
    own = [run for run in outcomes if run.run.stage == stage]
    for model in dict.fromkeys(run.config.model.size for run in own) if is_sweep(own) else ():
        first = next(run for run in own if run.config.model.size == model)
        rates: dict[float, list[Outcome]] = {}
        for run in outcomes:
            if (run.config.arm, run.config.model, run.config.tokens) == (
                first.config.arm,
                first.config.model,
                first.config.tokens,
            ):
                rates.setdefault(run.config.train.learning_rate, []).append(run)
        best = min(rates, key=lambda rate: mean_loss(rates[rate], "lm"))
        others = []
        for rate in sorted(rates.keys() - {best}):
            found = difference(rates[rate], rates[best], "lm")
            others += [f"{rate:g} is {_signed(found)} from it"] if found else []
        yield (
            f"{model}, learning rate: {best:g} has the lowest LM loss, {mean_loss(rates[best], 'lm'):.4f} nats; "
            f"{', '.join(others)} ({behind(rates[best], 'lm')})."
        )


def comparisons(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Compare every arm with full attention, and every other with MoBA, by size and loss."""
    for runs in by("size", outcomes).values():
        full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
        for reference in (full, moba):
            for own in by("arm", runs).values():
                if not reference or own in (full, reference):
                    continue
                for kind in LOSSES:
                    found = difference(own, reference, kind, seed_noise(runs, kind))
                    if found is not None:
                        yield _verdict(own[0], reference[0], kind, found)


def slopes(moba: Sequence[Outcome], full: Sequence[Outcome], axis: str) -> Iterator[str]:
    """Say how an arm's exponent differs from that of full attention, by loss."""
    for kind, name in LOSSES.items():
        if pair := fit_pair(moba, full, kind, axis):
            found, several = slope_difference(*pair), len({run.run.seed for run in full}) > 1
            yield (
                f"{name[:1].upper()}{name[1:]}: {moba[0].label}'s exponent minus full attention's lies in "
                f"{found.low:+.4f} to {found.high:+.4f}: {_word(0.0 not in found, several)}."
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
    runs = list(by("size", outcomes).values())[-1]
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    if len(by("arm", outcomes)) == 1 or not full or len(full[0].ranges) < 3:
        return
    last = len(full[0].ranges) - 1
    span, before = (_span(full[0], number) for number in (last, 1))
    found = gain(full, last, 1)
    yield (
        f"Use of context: with full attention ({full[0].run.size}) the loss at positions {span} differs from that at "
        f"{before} by {found.mean:+.4f} nats{_in(found.interval)}, text that differs from range to range included. The "
        "lower, the more the model gains from far context, and the more it can lose by leaving blocks out."
    )
    lost = difference(moba, full, (last, 1), seed_noise(runs, (last, 1)))
    if lost is not None and lost.interval is not None:
        yield (
            f"On the same text: from {before} to {span} the difference of MoBA from full attention changes by "
            f"{_signed(lost)} ({behind(moba, last, len(lost.per_seed))}): "
            f"{_word(lost.resolved, lost.noise is not None)}. What lies above zero is what full attention gains from "
            "far context and MoBA does not."
        )


def _around(run: Outcome, step: int) -> tuple[int, str] | None:
    """Return a twentieth of the steps, and their training loss before and after `step`; None without records."""
    span = run.config.train.steps // 20
    before = [loss for last, loss in run.trained.items() if step - span < last <= step]
    after = [loss for last, loss in run.trained.items() if step < last <= step + span]
    if not before or not after:
        return None
    first, second = (sum(losses) / len(losses) for losses in (before, after))
    return span, f"{first:.4f} and {second:.4f} nats ({second - first:+.4f}), {max(after):.4f} in its highest record"


def _gained(own: Sequence[Outcome]) -> str:
    """Say whether one arm of one size uses its context: at all, and far away."""
    last = len(own[0].ranges) - 1
    near, far = gain(own, last, 0), gain(own, last, last // 2)
    first, middle, end = (_span(own[0], number) for number in (0, last // 2, last))
    return (
        f"{own[0].run.size}: the loss at positions {end} is {_signed(near)} from that at {first}: context "
        f"{_counts(near)}. From that at {middle} it is {_signed(far)}: the second half of the window {_counts(far)} "
        f"({behind(own, last)}; the text differs from range to range, which the intervals hold)."
    )


def _reach(own: Sequence[Outcome]) -> str:
    first, (*cuts, farthest) = own[0], own[0].contexts
    gains = [f"{_signed(gain(own, 'trailing', Cut(cut)))} from that with {cut:,}" for cut in (*cuts, farthest)]
    return (
        f"{first.run.size}, {first.label}, the same last {first.config.trailing:,} tokens of every window: with all "
        f"{first.config.data.length:,} tokens in sight their loss is {', '.join(gains)}. What lies farther back than "
        f"{farthest:,} {_counts(gain(own, 'trailing', Cut(farthest)))} ({behind(own, 'trailing')})."
    )


def _counts(found: Difference) -> str:
    return "counts" if found.resolved and found.mean < 0 else "is not seen to count"


def _law_ratios(outcomes: Sequence[Outcome], axis: str) -> Iterator[str]:
    """Say how far each arm's law lies from that of full attention, at the most compute that both have spent."""
    full = of_kind(outcomes, FULL)
    for own in by("arm", outcomes).values():
        pair = fit_pair(own, full, "trailing", axis) if full and own != full else None
        if pair is None:
            continue
        compute = min(float(law.compute.max()) for law in pair)
        ratio = float(pair[0].law(compute) / pair[1].law(compute)) - 1
        low, high = (float(end[0]) - 1 for end in pair[0].ratio(pair[1], [compute]))
        several = len(pair[0].loss) >= 2 * len({run.run.size for run in own})
        word = _word(not low <= 0 <= high, several)
        yield (
            f"At an equal {AXES[axis].amount(compute)} ({axis}) the trailing loss of {own[0].label} lies {ratio:+.2%} "
            f"[{low:+.2%}, {high:+.2%}] from that of full attention, by the laws of {len(pair[0].loss)} runs each "
            f"({behind(own, 'trailing')}): {word}."
        )


def _closing(runs: Sequence[Outcome]) -> Iterator[str]:
    """Say how much of the gap between MoBA and full attention the hybrids close."""
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    noise = seed_noise(runs, "trailing")
    gap = difference(moba, full, "trailing", noise)
    if gap is None:
        return
    base = mean_loss(full, "trailing")
    yield (
        f"{runs[0].run.size}: MoBA in every layer costs {_signed(gap)} ({gap.mean / base:+.2%}) in trailing loss "
        f"({behind(runs, 'trailing')})."
    )
    for own in arms_of(runs, HYBRID):
        found = difference(own, full, "trailing", noise)
        if found is not None:
            of = f" of {own[0].layers}" if own[0].layers else ""
            yield (
                f"With {len(own[0].full_layers)}{of} layers full ({own[0].label}) it is {_signed(found)} "
                f"({found.mean / base:+.2%}), {1 - found.mean / gap.mean:.0%} of the gap closed."
            )


def _nearest(runs: Sequence[Outcome]) -> Iterator[str]:
    """Name the sparse candidate with the lowest trailing loss, and the one with the fewest keys as good as full."""
    sparse = [found for found in standings(runs) if found.key_share is not None and found.key_share < 1]
    sparse = [found for found in sparse if found.fair.trailing is not None]
    if not sparse:
        return
    yield f"{runs[0].run.size}: of {len(sparse)} sparse candidates the lowest trailing loss has {_stands(sparse[0])}"
    level = [found for found in sparse if found.fair.trailing and not _resolved_above(found.fair.trailing)]
    fewest = min(level, key=lambda found: found.key_share or 0, default=None)
    if fewest is None:
        yield "All of them are resolved above full attention."
    elif len(level) == 1:
        yield f"{fewest.runs[0].label} alone is not resolved above full attention."
    else:
        yield f"{len(level)} are not resolved above full attention; the fewest keys of these reads {_stands(fewest)}"


def _stands(found: Standing) -> str:
    difference, loss = found.fair.trailing, found.fair.trailing_loss
    assert difference is not None, "chosen by it"
    name = "full attention with the same key convolution" if found.own else "full attention"
    return (
        f"{found.runs[0].label}: {_signed(difference)} ({percent(difference, loss)} %) from {name}, "
        f"{found.key_share:.1%} of the keys read ({behind(found.runs, 'trailing')}): "
        f"{_word(difference.resolved, difference.noise is not None)}."
    )


def _resolved_above(found: Difference) -> bool:
    return found.mean > 0 and found.resolved


def _verdict(own: Outcome, reference: Outcome, kind: Named, found: Difference) -> str:
    way = "above" if found.mean > 0 else "below"
    seeds = len(found.per_seed)
    measured = behind([own], kind, seeds)
    if found.interval is not None:
        measured = f"{found.interval.low:+.4f} to {found.interval.high:+.4f} over {measured}"
    if seeds > 1:
        measured += f"; by seed {', '.join(f'{value:+.4f}' for value in found.per_seed)}"
    return (
        f"{own.run.size}, {LOSSES[kind]}: {own.label} is {abs(found.mean):.4f} nats {way} "
        f"{reference.label} ({measured}): {_word(found.resolved, found.noise is not None)}."
    )


def _word(resolved: bool, seeds_known: bool) -> str:
    if not resolved:
        return "**within noise**"
    return "**resolved**" if seeds_known else "**resolved on these windows**, for this one seed"


def _signed(found: Difference) -> str:
    return f"{found.mean:+.4f} nats{_in(found.interval)}"


def _in(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:+.4f}, {interval.high:+.4f}]"


def _span(run: Outcome, number: int) -> str:
    start, end = run.ranges[number]
    return f"{start:,}-{end:,}"
