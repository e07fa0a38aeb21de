"""Runs that a study compares have the same data: checked before it goes on, while it trains, and in its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openmoba.lab.config import DataConfig
from openmoba.lab.data.identity import Identity, Known, shared, stored_identity
from openmoba.lab.run_files import FAILED_FILE, has_begun
from openmoba.lab.study.recipe import PlannedRun, Recipe


@dataclass(frozen=True)
class RunData:
    """Settings and identity of a run's data.

    Attributes:
        origin: the model from outside the study that the run comes from, None without one.
    """

    name: str
    settings: DataConfig
    origin: str | None
    identity: Identity


def known_data(run: PlannedRun, recipe: Recipe, study: Path) -> list[Known]:
    """Return what the study's other runs that have begun say of the data of `run`."""
    others = [other for other in begun(recipe, study) if other.name != str(study / run.name)]
    return _known(_run_data(run, recipe, study), others)


def check_same_data(runs: Sequence[RunData]) -> None:
    """Raise ValueError if two of the runs read the same documents by their settings, but had others."""
    for number, run in enumerate(runs):
        for known in _known(run, runs[:number]):
            known.check(run.identity, f"{run.name}'s data.source={run.settings.source}")


def begun(recipe: Recipe, study: Path) -> list[RunData]:
    """Return the data of all runs that have begun and did not fail, which are trained anew."""
    return [
        _run_data(run, recipe, study)
        for run in recipe.runs
        if has_begun(study / run.name) and not (study / run.name / FAILED_FILE).exists()
    ]


def origin(run: PlannedRun, recipe: Recipe, study: Path) -> str | None:
    """Return the model from outside the study that `run` comes from, if it comes from one."""
    planned = {other.name: other for other in recipe.runs}
    while run.after is not None:
        run = planned[run.after]
    return run.config(study).train.start_from


def _run_data(run: PlannedRun, recipe: Recipe, study: Path) -> RunData:
    folder = study / run.name
    return RunData(str(folder), run.config(study).data, origin(run, recipe, study), stored_identity(folder))


def _known(run: RunData, others: Iterable[RunData]) -> list[Known]:
    way_out = "restore it as it was, or begin another study with another --out"
    return [
        Known(
            other.name,
            shared(other.identity, run.settings, other.settings, same_origin=run.origin == other.origin),
            way_out,
        )
        for other in others
    ]
