"""Which runs of a study stand together: those of a stage, a size, an arm; and which arms are compared with which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from openmoba.lab.arms import FULL, Kind
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.recipe import Stage


def of_stage(stage: Stage, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the runs that a stage compares: those of the other arms of the stage beside it, and its own."""
    beside, own = [], []
    for outcome in outcomes:
        run = outcome.run
        if run.stage == stage:
            own.append(outcome)
        elif run.stage.name == stage.beside and run.size in stage.sizes and _compares(stage, run.arm):
            beside.append(outcome)
    return beside + own if own else []


def _compares(stage: Stage, arm: str) -> bool:
    """Tell whether a stage is compared with this arm of the stage beside it."""
    return arm not in stage.arms and (arm in stage.beside_arms or not stage.beside_arms)


def by(key: str, outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Group outcomes by `key`: "arm" or "size", by its name in the recipe, in order of appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(getattr(outcome.run, key), []).append(outcome)
    return groups


def largest(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the runs of the last size that has arms to compare; of the last size, where none has."""
    sizes = list(by("size", outcomes).values())
    return next((runs for runs in reversed(sizes) if len(by("arm", runs)) > 1), sizes[-1])


def arms_of(outcomes: Iterable[Outcome], kind: Kind) -> list[list[Outcome]]:
    """Return the runs of each arm of one kind: the fewest full layers first, those without key convolution first."""
    arms = by("arm", (outcome for outcome in outcomes if outcome.config.arm.kind is kind)).values()
    return sorted(arms, key=lambda own: (len(own[0].full_layers), own[0].config.arm.key_conv is not None))


def of_kind(outcomes: Iterable[Outcome], kind: Kind) -> list[Outcome]:
    """Return the runs of the first arm of one kind; empty without one."""
    return next(iter(arms_of(outcomes, kind)), [])


def of_same_seeds(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return of each size the runs whose seeds all its arms have, or all of them where its arms share no seed.

    Only so do means of arms stand side by side: the luck of a seed that one arm alone has would look like the arm's.
    """
    kept = []
    for runs in by("size", outcomes).values():
        shared = set.intersection(*({run.run.seed for run in own} for own in by("arm", runs).values()))
        kept += [run for run in runs if run.run.seed in shared or not shared]
    return kept


def share_a_seed(first: Iterable[Outcome], second: Iterable[Outcome]) -> bool:
    """Tell whether two arms can be compared."""
    return bool({run.run.seed for run in first} & {run.run.seed for run in second})


def references(own: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Return the arms of full attention that an arm is compared with: the first, and that of its own key convolution.

    The latter differs from it in nothing but the choice of blocks.
    """
    full, fair = of_kind(outcomes, FULL), fair_full(own, outcomes)
    return [arm for arm in ([full, fair] if fair != full else [full]) if arm and arm != own]


def fair_full(own: Sequence[Outcome], outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the runs of full attention with the same key convolution; empty where the arm or the study has none."""
    arm = own[0].config.arm
    if arm.key_conv is None or arm.kind is FULL:
        return []
    fulls = arms_of(outcomes, FULL)
    return next((full for full in fulls if full[0].config.arm.without_blocks() == arm.without_blocks()), [])


def moba_settings(outcomes: Iterable[Outcome]) -> list[tuple[int, int, int]]:
    """Return block size, top-k, and blocks of a window of every MoBA setting among the runs, each once."""
    runs = [(run.config.arm, run.config.data.length) for run in outcomes if run.config.arm.kind is not FULL]
    return list(dict.fromkeys((arm.block_size, arm.top_k, -(-length // arm.block_size)) for arm, length in runs))
