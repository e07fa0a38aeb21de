"""`openmoba study`, `openmoba fit` and `openmoba plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from openmoba.lab.measure.compute import SIX_ND, AxisName
from openmoba.lab.progress import TerminalProgress, duration
from openmoba.limits import check_number

if TYPE_CHECKING:
    from openmoba.lab.study.recipe import Recipe


@dataclass(frozen=True)
class Study:
    """Train every run of a recipe that is not finished yet, then draw its charts and write its report.

    Stop it at any moment and give the same command again: finished runs are skipped, a cut one goes on from its
    checkpoint. The same command in several processes shares the runs among them; for several GPUs, give each
    process its CUDA_VISIBLE_DEVICES. Or every run takes all GPUs: torchrun --nproc-per-node 2 -m openmoba study ...
    """

    recipe: tyro.conf.Positional[Path]
    """TOML file that lists sizes, arms, seeds and stages; recipes/demo.toml is one to start from."""
    out: Path | None = None
    """Folder of the study; left out: runs/ and the recipe's name."""
    source: str | None = None
    """Documents to use instead of the recipe's run.data.source."""
    runs: tuple[str, ...] | None = None
    """Only the runs whose names match one of these patterns, such as 'pretrain/*-seed0', and those that they start
    from; left out: all."""
    axis: AxisName = SIX_ND
    """Convention of compute on the scaling chart's x axis."""
    dry_run: bool = False
    """Check the recipe and the folder, list the runs, their state, parameters, tokens, compute, and about how much
    memory and time they take, and stop."""
    tflops: float | None = None
    """With --dry-run: plan for one GPU whose large bf16 matrix products reach so many TFLOP/s, 700 for an H200; left
    out: for this machine."""

    def __post_init__(self) -> None:
        if self.tflops is not None:
            check_number("--tflops", self.tflops, 0, low_too=False)
            if not self.dry_run:
                raise ValueError(f"--tflops {self.tflops:g} is for plans; add --dry-run")

    def run(self) -> None:
        """Train what is missing, and say where the charts are."""
        import time

        from openmoba.lab.study.ranks import follow, leading
        from openmoba.lab.study.work import failures, finished, run_study
        from openmoba.lab.train.run import is_first, run_training

        if self.dry_run:
            self._plan()
            return
        if not is_first():
            follow(run_training)
            return
        start = time.monotonic()
        with leading(run_training) as train:
            recipe, out, part = self._read()
            run_study(recipe, out, train, TerminalProgress, part)
        failed = failures(part, out)
        if any(finished(run, out) for run in recipe.runs):
            _write_report(recipe, out, self.axis)
        if failed:
            raise ValueError(failed)
        which = f"all {len(recipe.runs)}" if part == recipe else f"the {len(part.runs)} chosen of {len(recipe.runs)}"
        print(f"{which} runs are finished, {duration(time.monotonic() - start)} in this process")

    def _read(self) -> tuple[Recipe, Path, Recipe]:
        """Return the recipe, the folder, and the recipe with the chosen runs alone."""
        from openmoba.lab.study.recipe import read_recipe

        recipe = read_recipe(self.recipe, self.source)
        part = recipe if self.runs is None else recipe.chosen(self.runs)
        return recipe, self.out or Path("runs") / self.recipe.stem, part

    def _plan(self) -> None:
        from openmoba.lab.study.overview import overview
        from openmoba.lab.study.work import check_folders, check_models, check_origins

        recipe, out, part = self._read()
        check_folders(recipe, out)
        check_models(recipe)
        check_origins(part, out)
        print(overview(part, out, self.tflops))


@dataclass(frozen=True)
class Fit:
    """Print the fitted power laws of a study's finished runs, with their intervals."""

    study: tyro.conf.Positional[Path]
    """Folder of the study."""
    axis: AxisName = SIX_ND
    """Convention of compute."""

    def run(self) -> None:
        """Fit and print."""
        from openmoba.lab.study.outcomes import read_outcomes
        from openmoba.lab.study.recipe import recipe_of
        from openmoba.lab.study.report import fit_tables

        recipe = recipe_of(self.study)
        print(fit_tables(recipe, read_outcomes(recipe, self.study), self.axis))


@dataclass(frozen=True)
class Plot:
    """Draw the charts of a study's finished runs again, and write its report."""

    study: tyro.conf.Positional[Path]
    """Folder of the study."""
    axis: AxisName = SIX_ND
    """Convention of compute on the scaling chart's x axis."""

    def run(self) -> None:
        """Draw, and say where the charts are."""
        from openmoba.lab.study.recipe import recipe_of

        _write_report(recipe_of(self.study), self.study, self.axis)


def _write_report(recipe: Recipe, study: Path, axis: str) -> None:
    from openmoba.lab.study.report import write_report

    print(*write_report(recipe, study, axis), sep="\n")
