"""What the finished runs of a study measured, and the comparisons made of it."""

# W validation windows

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from openmoba.lab.arms import FULL, Kind
from openmoba.lab.columns import counted
from openmoba.lab.config import RunConfig
from openmoba.lab.data.identity import identity_in
from openmoba.lab.measure.resample import Difference, Floats, Numbers, SeedNoise, paired_difference
from openmoba.lab.model.build import SIZES
from openmoba.lab.run_files import RECIPE_FILE, RESULT_FILE
from openmoba.lab.study.recipe import PlannedRun, Recipe, Stage
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
    """

    run: PlannedRun
    config: RunConfig
    result: Row
    evals: list[Row]
    trained: dict[int, float]

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
        speed = (self.result.get("speed") or {}).get("tokens_per_second")
        return float(speed or self.final["tokens"] / self.final["compute"]["accelerator_seconds"])

    @property
    def mfu(self) -> float | None:
        """Share of the data sheet's rate that training reached; None where it is not known."""
        return (self.result.get("speed") or {}).get("mfu")

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
    return outcomes


def _check_planned(run: PlannedRun, config: RunConfig, study: Path) -> None:
    """Raise ValueError if the folder of `run` holds another one, as after folders were merged."""
    source = run.config(study).data.source  # that of `study --source` is not in the recipe that the folder keeps
    if changed := run.changed_from(replace(config, data=replace(config.data, source=source)), study):
        raise ValueError(
            f"{study / run.name} holds another run than {study / RECIPE_FILE} says ({'; '.join(changed)}); bring the "
            "run or the recipe that belongs there"
        )


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


def behind(outcomes: Sequence[Outcome], kind: Loss, seeds: int | None = None) -> str:
    """Say how many documents, windows and seeds stand behind a number of these runs.

    Args:
        seeds: None counts those of each arm and size.
    """
    first = outcomes[0]
    counts = Counter((run.run.arm, run.run.size) for run in outcomes).values()
    fewest, most = (seeds, seeds) if seeds else (min(counts), max(counts))
    kind = "lm" if not isinstance(kind, str) and not first.has_positions else kind
    documents = first.documents(kind)[~np.isnan(first.windows(kind))]
    parts = [counted(len(set(documents.tolist())), "document"), counted(len(documents), "window")]
    parts.append(f"{fewest} to {most} seeds" if fewest < most else counted(most, "seed"))
    return ", ".join(parts if "document" in first.final["windows"] else parts[1:])


def speeds_apart(outcomes: Iterable[Outcome]) -> str | None:
    """Say what makes seconds and tokens per second of these runs unlike; None where they compare.

    Other commits, devices or launches do, and steps so short that the host's launches may be what is timed: of one
    window, on a GPU without CUDA graphs.
    """
    runs = list(outcomes)
    devices = (", ".join(run.result["hardware"]["gpus"]) or run.result["hardware"]["cpu"] for run in runs)
    found = {
        "commits": [str(run.result["commit"])[:10] for run in runs],
        "devices": devices,
        "ways to run layers": [_launched(run.result) for run in runs],
    }
    differing = [(name, list(dict.fromkeys(values))) for name, values in found.items()]
    unlike = [f"{len(each)} {name} ({', '.join(each)})" for name, each in differing if len(each) > 1]
    if not unlike and any(map(_may_time_the_host, runs)):
        return "one window a step without CUDA graphs, where the host may be what is timed"
    return " and ".join(unlike) or None


def _may_time_the_host(run: Outcome) -> bool:
    train = run.config.train
    windows = train.micro_batch_size or train.batch_size
    return bool(run.result["hardware"]["gpus"]) and windows == 1 and not run.result.get("graphed")


def _launched(result: Row) -> str:
    """Say how the layers of a run were launched. The first records do not say; those runs were eager."""
    return ("compiled" if result.get("compiled") else "eager") + (" in CUDA graphs" if result.get("graphed") else "")


def moba_settings(outcomes: Iterable[Outcome]) -> list[tuple[int, int, int]]:
    """Return block size, top-k, and blocks of a window of every MoBA setting among the runs, each once."""
    runs = [(run.config.arm, run.config.data.length) for run in outcomes if run.config.arm.kind is not FULL]
    return list(dict.fromkeys((arm.block_size, arm.top_k, -(-length // arm.block_size)) for arm, length in runs))


def mean_loss(outcomes: Sequence[Outcome], kind: Named | int | Cut) -> float:
    """Return the mean final loss of the runs."""
    return sum(outcome.loss(kind) for outcome in outcomes) / len(outcomes)


def paired_loss(reference: Sequence[Outcome], own: Sequence[Outcome], kind: Named | int | Cut) -> float:
    """Return the mean final loss of the reference's runs whose seeds `own` has too: what a difference is a part of."""
    seeds = {run.run.seed for run in own}
    return mean_loss([run for run in reference if run.run.seed in seeds], kind)


def seed_noise(outcomes: Iterable[Outcome], kind: Loss) -> SeedNoise | None:
    """Return the noise of seeds, pooled over the arms that have several; None if none has.

    Args:
        outcomes: the runs of one stage and one size.
    """
    measured = [outcome for outcome in outcomes if outcome.has(kind)]
    arms = by("arm", measured).values()
    return SeedNoise.of([float(np.nanmean(outcome.windows(kind))) for outcome in own] for own in arms)


def difference(
    first: Sequence[Outcome], second: Sequence[Outcome], kind: Loss, noise: SeedNoise | None = None
) -> Difference | None:
    """Return the loss of the first arm minus that of the second, over the seeds that both have.

    None without such a seed, or without windows that have this loss.

    Args:
        first, second: the runs of two arms of one stage and one size.
        noise: `seed_noise` of that stage and size, which the interval then holds.

    Raises:
        ValueError: the runs of a pair were not measured on the same windows.
    """
    own, other = ({run.run.seed: run for run in runs} for runs in (first, second))
    pairs = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
    if not pairs or not all(run.has(kind) for pair in pairs for run in pair):
        return None
    documents = common_documents([run for pair in pairs for run in pair], kind)
    firsts, seconds = zip(*((one.windows(kind), two.windows(kind)) for one, two in pairs), strict=True)
    return paired_difference(firsts, seconds, documents, noise)


def gain(outcomes: Sequence[Outcome], first_kind: Loss, second_kind: Loss) -> Difference:
    """Return one loss of an arm minus another of the same windows, such as a later position range minus an earlier."""
    documents = common_documents(outcomes, first_kind)
    first, second = ([outcome.windows(kind) for outcome in outcomes] for kind in (first_kind, second_kind))
    return paired_difference(first, second, documents)


def common_documents(outcomes: Sequence[Outcome], kind: Loss) -> Numbers:
    """List the documents of the windows that all these runs were measured on, as far as records say."""
    known = [outcome for outcome in outcomes if "document" in outcome.final["windows"]] or outcomes
    documents = known[0].documents(kind)
    for other in outcomes:
        same = np.array_equal(other.documents(kind), documents) if other in known else True
        if not same or len(other.windows(kind)) != len(documents):
            raise ValueError(
                f"{known[0].run.name} and {other.run.name} were not measured on the same validation windows, so "
                "they cannot be compared; train one of them again with the other's data"
            )
    return documents
