"""What the finished runs of a study measured, and the comparisons and fits made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmoba.config import count_full_layers
from openmoba.lab.config import RunConfig
from openmoba.lab.fit import Difference, Fit, Interval, fit_runs, paired_difference
from openmoba.lab.history import evaluations, read_result
from openmoba.lab.identity import identity_in
from openmoba.lab.recipe import PlannedRun, Recipe
from openmoba.lab.records import Row
from openmoba.lab.study_data import RunData, check_same_data, origin

Loss = Literal["trailing", "lm"]

ARM_NAMES = {"full": "Full attention", "moba": "MoBA"}


@dataclass(frozen=True)
class Outcome:
    """One finished run: its plan, its configuration, `result.json`, and its evaluations in order of steps."""

    run: PlannedRun
    config: RunConfig
    result: Row
    evals: list[Row]

    @property
    def final(self) -> Row:
        """The evaluation of the finished model."""
        return self.evals[-1]

    @property
    def label(self) -> str:
        """The arm's name in figures and tables."""
        return ARM_NAMES.get(self.run.arm, self.run.arm)

    @property
    def full_layers(self) -> int:
        """How many layers a layer-wise hybrid keeps full."""
        return count_full_layers(self.config.arm.full_layers)

    def loss(self, kind: Loss) -> float:
        """Final loss in nats; ValueError if no validation window reached the full length."""
        loss = self.final[f"{kind}_loss"]
        if loss is None:
            raise ValueError(
                f"{self.run.name} has no trailing loss, since none of its validation windows reaches "
                f"data.length={self.config.data.length}; lower it, or give longer validation documents"
            )
        return float(loss)

    def windows(self, kind: Loss) -> list[float]:
        """Final loss of every validation window, in nats; none for the trailing loss if all windows are shorter."""
        return [loss for loss in self.final["windows"][kind] if loss is not None]


def read_outcomes(recipe: Recipe, study: Path) -> list[Outcome]:
    """The finished runs of `recipe` in the folder `study`, in the recipe's order.

    Raises:
        ValueError: damaged records, or runs of the same documents by their settings that were trained on others.
    """
    outcomes = []
    for run in recipe.runs:
        folder = study / run.name
        if (folder / "result.json").exists():
            config, result = read_result(folder)
            outcomes.append(Outcome(run, config, result, evaluations(folder, config, result)))
    check_same_data(
        [
            RunData(str(study / o.run.name), o.config.data, origin(o.run, recipe, study), identity_in(o.result))
            for o in outcomes
        ]
    )
    return outcomes


def by(key: str, outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes grouped by `key`: "arm" or "size", by its name in the recipe, in order of appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(getattr(outcome.run, key), []).append(outcome)
    return groups


def of_kind(outcomes: Iterable[Outcome], arm: str) -> list[Outcome]:
    """The runs of the first arm of the kind "full", "moba", ...; empty without one."""
    own = [outcome for outcome in outcomes if outcome.config.arm.name == arm]
    return [outcome for outcome in own if outcome.run.arm == own[0].run.arm]


def moba_settings(outcomes: Iterable[Outcome]) -> list[tuple[int, int, int]]:
    """Block size, top-k, and blocks of a window of every MoBA setting among the runs, each once."""
    runs = [(outcome.config.arm, outcome.config.data.length) for outcome in outcomes]
    settings = [(arm.block_size, arm.top_k, -(-length // arm.block_size)) for arm, length in runs if arm.name != "full"]
    return list(dict.fromkeys(settings))


def mean_loss(outcomes: Sequence[Outcome], kind: Loss) -> float:
    """Mean final loss of the runs."""
    return sum(outcome.loss(kind) for outcome in outcomes) / len(outcomes)


def difference(first: Sequence[Outcome], second: Sequence[Outcome], kind: Loss) -> Difference | None:
    """Loss of the first arm minus that of the second, over the seeds that both have.

    None without such a seed, or without windows that have this loss.

    Args:
        first, second: the runs of two arms of one stage and one size.
    """
    own = {outcome.run.seed: outcome.windows(kind) for outcome in first}
    other = {outcome.run.seed: outcome.windows(kind) for outcome in second}
    seeds = sorted(own.keys() & other.keys())
    if not any(own[seed] for seed in seeds):
        return None
    return paired_difference([own[seed] for seed in seeds], [other[seed] for seed in seeds])


def fit(outcomes: Sequence[Outcome], kind: Loss, axis: str) -> Fit | None:
    """The law through the ends of one arm's runs; None if they do not differ in compute or lack this loss."""
    return _fit(outcomes, [outcome.windows(kind) for outcome in outcomes], axis)


def position_fits(outcomes: Sequence[Outcome], axis: str) -> list[tuple[int, int, Fit | None]]:
    """`fit` for the loss of every position range: (start, end, law). Its bootstrap is over runs alone."""
    ranges = zip(*(outcome.final["position_loss"] for outcome in outcomes), strict=True)
    return [
        (rows[0]["start"], rows[0]["end"], _fit(outcomes, [[row["loss"]] for row in rows], axis)) for rows in ranges
    ]


def slope_difference(first: Fit, second: Fit) -> Interval:
    """Interval of the first exponent minus the second's, over replicates that share their draws."""
    return Interval.of(first.replicates[:, 1] - second.replicates[:, 1])


def _fit(outcomes: Sequence[Outcome], windows: list[list[float]], axis: str) -> Fit | None:
    compute = [outcome.final["compute"][axis] for outcome in outcomes]
    return fit_runs(compute, windows) if len(set(compute)) > 1 and all(windows) else None
