"""What the finished runs of a study measured."""

# W validation windows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from openmoba.lab.config import RunConfig
from openmoba.lab.data.identity import identity_in
from openmoba.lab.measure.resample import Floats, Numbers
from openmoba.lab.model.build import SIZES
from openmoba.lab.run_files import RECIPE_FILE, RESULT_FILE
from openmoba.lab.study.rates import Key, rate_of, read_rates
from openmoba.lab.study.recipe import PlannedRun, Recipe
from openmoba.lab.study.same_data import RunData, check_same_data, origin
from openmoba.lab.train.history import evaluations, history, read_result
from openmoba.records.disk import Row

Named = Literal["trailing", "lm"]
"""The losses that a record names."""


UNKNOWN_LAYERS = 1000
"""Of a model from outside the study, for want of the number."""


@dataclass(frozen=True)
class Cut:
    """The trailing loss with a context of so many tokens, one of the run's `eval.contexts`."""

    context: int


Loss = Named | int | tuple[int, int] | Cut
"""A loss that a record names, that of a position range by its number from 0, that of one range minus that of another,
or the trailing loss with the context cut short."""


@dataclass(frozen=True)
class Outcome:
    """One finished run: its plan, its configuration, `result.json`, its evaluations in order of steps, training losses.

    Attributes:
        trained: last step of a record -> mean training loss of the steps since the record before it.
        rate: tokens per second of its arm at the fastest micro-batch, of which its seconds are; None: its own.
    """

    run: PlannedRun
    config: RunConfig
    result: Row
    evals: list[Row]
    trained: dict[int, float]
    rate: float | None = None

    @property
    def final(self) -> Row:
        """The evaluation of the finished model."""
        return self.evals[-1]

    @property
    def label(self) -> str:
        """The arm's name in figures and tables."""
        return self.config.arm.label(self.run.arm)

    @property
    def layers(self) -> int | None:
        """Layers of the model; None if it comes from outside the study."""
        if self.config.train.start_from is not None and self.run.after is None:
            return None
        layers = self.config.model.overrides.get("num_hidden_layers", SIZES[self.config.model.size].layers)
        return int(layers or 0)

    @property
    def full_layers(self) -> frozenset[int]:
        """Layers whose attention is full; of a model from outside the study, as if it had 1,000 layers."""
        layers = self.layers or UNKNOWN_LAYERS
        attention = self.config.arm.sparsest(self.config.train.steps)
        return frozenset(range(layers)) if attention is None else attention.full_layer_indices(layers)

    @property
    def ends_full(self) -> bool:
        """Whether its full layers are the last ones."""
        layers = self.layers or UNKNOWN_LAYERS
        return self.full_layers == frozenset(range(layers - len(self.full_layers), layers))

    @property
    def parameters(self) -> int:
        """Parameters of its model without embeddings."""
        return int(self.result["params"]["non_embedding"])

    def key_share(self, length: int | None = None) -> float | None:
        """Return the keys that queries read in training, over all layers, as a share of those of full attention.

        None for a model from outside the study, whose layers are not known.

        Args:
            length: only the first so many positions of a window; None for all.
        """
        if self.layers is None:
            return None
        config = self.config
        return config.arm.key_share(self.layers, length or config.data.length, config.train.steps)

    @property
    def tokens_per_second(self) -> float:
        """Speed of training, over all devices; of records that do not hold it, the mean with what it takes to start."""
        if self.rate is not None:
            return self.rate
        speed = (self.result.get("speed") or {}).get("tokens_per_second")
        return float(speed or self.final["tokens"] / self.final["compute"]["accelerator_seconds"])

    @property
    def mfu(self) -> float | None:
        """Share of the data sheet's rate that training reached; None where it is not known."""
        return None if self.rate is not None else (self.result.get("speed") or {}).get("mfu")

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First position of every position range, and the one after its last."""
        return [(row["start"], row["end"]) for row in self.final["position_loss"]]

    @property
    def has_positions(self) -> bool:
        """Whether the final evaluation kept the loss of every window's ranges; old records have their means alone."""
        return "positions" in self.final["windows"]

    @property
    def contexts(self) -> tuple[int, ...]:
        """Contexts with which the trailing loss was measured, too."""
        return tuple(cut["context"] for cut in self.final.get("context_loss", ()))

    def has(self, kind: Loss) -> bool:
        """Say whether a validation window has this loss; no trailing loss if all are shorter than the length."""
        return bool((~np.isnan(self.windows(kind))).any())

    def loss(self, kind: Named | int | Cut) -> float:
        """Return the final loss in nats, a mean over tokens; ValueError if no validation window has it."""
        if isinstance(kind, Cut):
            return float(self.final["context_loss"][self.contexts.index(kind.context)]["loss"])
        loss = self.final["position_loss"][kind]["loss"] if isinstance(kind, int) else self.final[f"{kind}_loss"]
        if loss is None:
            raise ValueError(
                f"{self.run.name} has no trailing loss, since none of its validation windows reaches "
                f"data.length={self.config.data.length}; lower it, or give longer validation documents"
            )
        return float(loss)

    def windows(self, kind: Loss) -> Floats:
        """Return the final loss of every validation window, float64 `[W]` in nats, NaN where a window lacks it.

        Records made before windows kept their position ranges give one mean over all windows for a range.
        """
        if isinstance(kind, tuple):
            return self.windows(kind[0]) - self.windows(kind[1])
        if isinstance(kind, str):
            return np.asarray(self.final["windows"][kind], dtype=np.float64)  # None becomes NaN
        if isinstance(kind, Cut):
            number = self.contexts.index(kind.context)
            return np.asarray([losses[number] for losses in self.final["windows"]["contexts"]], dtype=np.float64)
        if not self.has_positions:
            return np.asarray([self.loss(kind)])
        return np.asarray([losses[kind] for losses in self.final["windows"]["positions"]], dtype=np.float64)

    def documents(self, kind: Loss) -> Numbers:
        """Return the document of every one of these windows, int64 `[W]`; each its own where the records do not say."""
        one_mean = isinstance(kind, int) and not self.has_positions
        documents = None if one_mean else self.final["windows"].get("document")
        return np.asarray(range(len(self.windows(kind))) if documents is None else documents, dtype=np.int64)


def read_outcomes(recipe: Recipe, study: Path) -> list[Outcome]:
    """Read the finished runs of `recipe` in the folder `study`, in the recipe's order.

    Raises:
        ValueError: damaged records, a run that is not the recipe's, or runs of the same documents by their settings
            that were trained on others.
    """
    outcomes = []
    for run in recipe.runs:
        folder = study / run.name
        if (folder / RESULT_FILE).exists():
            config, result = read_result(folder)
            _check_planned(run, config, study)
            trained = {row["step"]: row["loss"] for row in history(folder) if row["kind"] == "train"}
            outcomes.append(Outcome(run, config, result, evaluations(folder, config, result), trained))
    check_same_data(
        [
            RunData(str(study / o.run.name), o.config.data, origin(o.run, recipe, study), identity_in(o.result))
            for o in outcomes
        ]
    )
    if not all(outcome.has_positions for outcome in outcomes):  # older records: ranges are compared by their means
        for outcome in outcomes:
            outcome.final["windows"].pop("positions", None)
    return _at_rates(outcomes, read_rates(study))


def unrated(outcomes: Sequence[Outcome], study: Path) -> list[str]:
    """Name the runs for which the study's rates lack a row, so that none is used; nothing without rates."""
    rates = read_rates(study)
    return [run.run.name for run in outcomes if rates and _rate(run, rates) is None]


def _at_rates(outcomes: list[Outcome], rates: dict[Key, float]) -> list[Outcome]:
    """Give all runs the seconds that their tokens take at these rates, if there is one for each."""
    found = [_rate(run, rates) for run in outcomes]
    return [
        replace(run, rate=rate, evals=[_retimed(row, rate) for row in run.evals]) if rate and all(found) else run
        for run, rate in zip(outcomes, found, strict=True)
    ]


def _rate(run: Outcome, rates: dict[Key, float]) -> float | None:
    return rate_of(run.config, run.result["hardware"]["gpus"], rates)


def _retimed(row: Row, rate: float) -> Row:
    return row | {"compute": row["compute"] | {"accelerator_seconds": row["tokens"] / rate}}


def _check_planned(run: PlannedRun, config: RunConfig, study: Path) -> None:
    """Raise ValueError if the folder of `run` holds another one, as after folders were merged."""
    source = run.config(study).data.source  # that of `study --source` is not in the recipe that the folder keeps
    if changed := run.changed_from(replace(config, data=replace(config.data, source=source)), study):
        raise ValueError(
            f"{study / run.name} holds another run than {study / RECIPE_FILE} says ({'; '.join(changed)}); bring the "
            "run or the recipe that belongs there"
        )
