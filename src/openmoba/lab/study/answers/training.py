"""What records of training say: which learning rate is the best, and what a change of attention does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from openmoba.lab.arms import FULL
from openmoba.lab.config import RunConfig, changes
from openmoba.lab.measure.resample import SeedNoise
from openmoba.lab.study.compare import behind, difference, mean_loss
from openmoba.lab.study.groups import by, of_kind
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.recipe import Stage
from openmoba.lab.study.words import nats, size_name, verdict


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


def _around(run: Outcome, step: int) -> tuple[int, str] | None:
    """Return a twentieth of the steps, and their training loss before and after `step`; None without records."""
    around = run.config.train.steps // 20
    before = [loss for last, loss in run.trained.items() if step - around < last <= step]
    after = [loss for last, loss in run.trained.items() if step < last <= step + around]
    if not before or not after:
        return None
    first, second = (sum(losses) / len(losses) for losses in (before, after))
    return around, f"{first:.4f} and {second:.4f} nats ({second - first:+.4f}), {max(after):.4f} in its highest record"
