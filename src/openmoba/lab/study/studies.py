"""Studies that lie in folders: their recipes, their finished runs, and what these answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from openmoba.lab.measure import compute
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study.answers.stage import in_short
from openmoba.lab.study.charts import FOLDER, law_axes
from openmoba.lab.study.groups import of_stage
from openmoba.lab.study.outcomes import Outcome, read_outcomes
from openmoba.lab.study.recipe import Recipe, Stage, read_recipe
from openmoba.lab.study.words import so_far

ORDER = ("positions", "compare", "scaling", "layers")
"""Charts in the order in which their questions build on each other."""


@dataclass(frozen=True)
class Study:
    """A study's folder, its recipe and its finished runs."""

    folder: Path
    recipe: Recipe
    outcomes: list[Outcome]

    def runs(self, stage: Stage) -> list[Outcome]:
        """Return the finished runs that one stage compares."""
        return of_stage(stage, self.outcomes)

    @property
    def so_far(self) -> str:
        """What stands before a sentence of an unfinished study; "" before one of a finished."""
        unfinished = so_far(self.recipe, self.outcomes)
        return f"**{unfinished}.** " if unfinished else ""

    def axes(self, stage: Stage) -> list[str]:
        """Return the conventions of compute by which the stage's runs are compared."""
        return law_axes(stage, self.runs(stage), compute.SIX_ND) if stage.chart == "scaling" else [compute.SIX_ND]

    @cached_property
    def answers(self) -> dict[str, str]:
        """Stage's name -> its answer in short; "" where it has none yet. Laws are fitted for it, so once."""
        runs = [(stage, self.runs(stage)) for stage in self.recipe.stages]
        return {stage.name: in_short(stage, own, self.axes(stage)) if own else "" for stage, own in runs}

    @cached_property
    def answering(self) -> Stage | None:
        """The stage whose answer is the study's: that of the last question; None where none has one yet."""
        stages = sorted(self.recipe.stages, key=lambda stage: -ORDER.index(stage.chart))
        return next((stage for stage in stages if self.answers[stage.name]), None)

    def figures(self, stage: Stage) -> list[Path]:
        """Return the charts that the stage asks for, as far as they are drawn."""
        ends = {"scaling": "scaling-law*", "layers": "*layerwise-hybrid", "compare": "*candidates"}
        more = [] if stage.chart in ("scaling", "layers") else ["contexts"]
        names = [ends.get(stage.chart, "positions"), *more]
        found = [
            sorted((self.folder / FOLDER).glob(f"{stage.name}-{name}.png"), key=lambda p: p.stem) for name in names
        ]
        return [path for paths in found for path in paths]


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """Read the studies in the folders that hold a recipe and a finished run, in the order of their questions."""
    studies = []
    for folder in folders:
        if (folder / RECIPE_FILE).exists():
            recipe = read_recipe(folder / RECIPE_FILE)
            if outcomes := read_outcomes(recipe, folder):
                studies.append(Study(folder, recipe, outcomes))
    return sorted(studies, key=lambda study: ORDER.index((study.answering or study.recipe.stages[-1]).chart))


def link(path: Path, page: Path) -> str:
    """Return the path as a page in the folder `page` links to it."""
    return Path(os.path.relpath(path, page)).as_posix()
