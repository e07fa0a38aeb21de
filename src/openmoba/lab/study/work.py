"""A study: work through a recipe's runs until all are finished, alone or together with other processes.

The folder is the only state. A run is finished when its `result.json` is there; a process claims a run before it
trains it, and a run that was cut short goes on from its checkpoint. So a study may be stopped at any moment and
started again, and any number of processes may work through it at once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from openmoba.lab.config import RunConfig, from_dict, stored_config, to_dict
from openmoba.lab.errors import DivergenceError
from openmoba.lab.model.build import check_model
from openmoba.lab.model.checkpoint import checkpoints
from openmoba.lab.progress import Progress, duration
from openmoba.lab.run_files import CONFIG_FILE, FAILED_FILE, RECIPE_FILE, RESULT_FILE, has_begun
from openmoba.lab.study.recipe import PlannedRun, Recipe
from openmoba.lab.study.same_data import begun, check_same_data, known_data
from openmoba.lab.train.plan import planned_work
from openmoba.records.disk import Row, expect, read_json, remove_leftovers, write_json, write_text
from openmoba.records.locks import CLAIM_FILE, claim, holder

POLL_SECONDS = 1.0

Train = Callable[..., Row]


def run_study(
    recipe: Recipe, study: Path, train: Train, reporter: Callable[[str], Progress], part: Recipe | None = None
) -> int:
    """Train every run of `recipe` that is not finished; returns how many this process worked on.

    A run that diverges is marked as failed, for its configuration, and the others go on: see `failures`.

    Args:
        study: the study's folder; runs lie in it by their names.
        train: `openmoba.lab.train.run.run_training`, which leaves failed.json in the folder of a run that diverges.
        reporter: label -> progress of what is so labelled.
        part: the recipe with the runs that are wanted now; None wants all.

    Raises:
        ValueError: a run's folder holds a run of another configuration, or runs to be compared have different data
            a run that is to be trained cannot be shared by the processes that torchrun started (nothing was trained
            then), or a run failed.
    """
    wanted = part or recipe
    check_folders(recipe, study)
    check_models(recipe)
    _check_shares(_to_do(wanted, study))
    study.mkdir(parents=True, exist_ok=True)
    remove_leftovers(study)
    write_text(study / RECIPE_FILE, recipe.text)
    check_origins(wanted, study)
    clock = StudyClock(wanted, study)
    trained = 0
    waiting = False
    while unfinished := _to_do(wanted, study):
        if any(_attempt(run, recipe, study, train, reporter, clock) for run in unfinished):
            trained, waiting = trained + 1, False
            continue
        if not waiting:
            reporter("").note(f"waiting for {_holders(unfinished, study)}")
            waiting = True
        time.sleep(POLL_SECONDS)
    return trained


def finished(run: PlannedRun, study: Path) -> bool:
    """Tell whether the run has its result."""
    return (study / run.name / RESULT_FILE).exists()


def failure(run: PlannedRun, study: Path) -> str | None:
    """Say why the run failed with the configuration that it has now; None if it did not."""
    file = study / run.name / FAILED_FILE
    if not file.exists():
        return None
    found = read_json(file)
    expect(found, {"reason": str, "config": dict}, str(file))
    return None if run.changed_from(from_dict(RunConfig, found["config"]), study) else str(found["reason"])


def failures(recipe: Recipe, study: Path) -> str | None:
    """Say what failed, why, and what to do, in one text; None if nothing did."""
    reasons = {run.name: reason for run in recipe.runs if (reason := failure(run, study)) is not None}
    if not reasons:
        return None
    missing = sum(not finished(run, study) for run in recipe.runs) - len(reasons)
    after = f" {missing} that start from them were not trained." if missing else ""
    return (
        f"{len(reasons)} of {len(recipe.runs)} runs failed.{after}\n"
        + "\n".join(f"{name}: {reason}" for name, reason in reasons.items())
        + f"\nChange these settings in the recipe and start it again with --out {study}: runs that failed are then "
        "trained anew, the others stay"
    )


def _to_do(recipe: Recipe, study: Path) -> list[PlannedRun]:
    """List the runs that are not finished, and neither failed nor start from one that did."""
    failed: set[str] = set()
    for run in recipe.runs:  # dependencies first
        if failure(run, study) is not None or run.after in failed:
            failed.add(run.name)
    return [run for run in recipe.runs if run.name not in failed and not finished(run, study)]


def check_folders(recipe: Recipe, study: Path) -> None:
    """Raise ValueError if a run was made with another configuration than the recipe's, or runs with different data.

    So does a run that the recipe does not name: the folder's report would leave it out, and lose the recipe that does.
    """
    if (study / CONFIG_FILE).exists():
        raise ValueError(f"{study} holds a run or a model, and a study has a folder of its own; choose another --out")
    names = {run.name for run in recipe.runs}
    found = sorted(str(path.parent.relative_to(study)) for path in study.glob(f"*/*/{CONFIG_FILE}"))
    strange = [name for name in found if name not in names and has_begun(study / name)]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise ValueError(
            f"{study} holds runs that the recipe does not name ({', '.join(strange[:3])}{more}); restore the recipe, "
            "choose another --out, or move these folders away"
        )
    for run in recipe.runs:
        folder = study / run.name
        if not (folder / CONFIG_FILE).exists() or not has_begun(folder) or (folder / FAILED_FILE).exists():
            continue  # what failed is trained anew with another configuration
        if changed := run.changed_from(stored_config(folder), study):
            raise ValueError(
                f"{folder} was made with another configuration ({'; '.join(changed)}); "
                "restore the recipe, choose another --out, or delete that folder to train it again"
            )
    check_same_data(begun(recipe, study))


def check_origins(recipe: Recipe, study: Path) -> None:
    """Raise ValueError if a run is to start from a finished one whose weights are not here."""
    lost = {
        run.after: run.name
        for run in recipe.runs
        if run.after is not None
        and not finished(run, study)
        and (study / run.after / RESULT_FILE).exists()
        and not checkpoints(study / run.after)
    }
    for origin, name in lost.items():
        raise ValueError(
            f"{name} starts from {study / str(origin)}, which is finished but has no checkpoint here; bring it, delete "
            "that folder to train the run again, or leave out with --runs what starts from it"
        )


def check_models(recipe: Recipe) -> None:
    """Raise ValueError if a run's model cannot be built, or cannot have the attention of its arm."""
    checked = []
    for run in recipe.runs:
        config = run.config(Path())
        attention = config.arm.sparsest(config.train.steps)
        if config.train.start_from is None and (config.model, config.data.length, attention) not in checked:
            checked.append((config.model, config.data.length, attention))
            try:
                check_model(*checked[-1])
            except ValueError as error:
                raise ValueError(f"run {run.name}: {error}") from error


def _check_shares(runs: list[PlannedRun]) -> None:
    """Raise ValueError if the processes that torchrun started cannot share a run."""
    from openmoba.lab.train.arguments import shares  # transformers.Trainer takes seconds to import

    for run in runs:
        try:
            shares(run.config(Path()).train)
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from error


class StudyClock:
    """Time left for a whole study, from the speed of this process so far.

    Work is counted in operations, see `planned_work`; runs that others finish meanwhile count as done.
    """

    def __init__(self, recipe: Recipe, study: Path) -> None:
        self.recipe, self.study = recipe, study
        self._work = {run.name: planned_work(run.alone()) for run in recipe.runs}
        self._start: float | None = None
        self._own = 0.0

    def left(self, run: PlannedRun, share: float) -> str:
        """Say what share of the study is done, and the time left, with `share` of `run` done by this process."""
        part = share * self._work[run.name]
        own = self._own + part
        if self._start is None:  # without the preparation of data, which runs after the first do not have
            self._start, self._skipped = time.monotonic(), own
        total = sum(self._work.values())
        done = sum(self._work[other.name] for other in self.recipe.runs if finished(other, self.study)) + part
        text = f"study {done / total:.0%}"
        seconds = time.monotonic() - self._start
        if own == self._skipped:
            return text
        return f"{text}, {duration((total - done) * seconds / (own - self._skipped))} left"

    def finish(self, run: PlannedRun) -> None:
        """Count `run` as trained by this process."""
        self._own += self._work[run.name]


class _RunProgress(Progress):
    """A run's own progress, with the study's beside it."""

    def __init__(self, run: PlannedRun, steps: int, own: Progress, clock: StudyClock) -> None:
        self.run, self.steps, self.own, self.clock = run, steps, own, clock

    def note(self, text: str) -> None:
        self.own.note(text)

    def step(self, done: int, total: int, detail: str = "", share: float | None = None) -> None:
        if total == self.steps:
            detail = f"{detail}  {self.clock.left(self.run, done / total if share is None else share)}"
        self.own.step(done, total, detail, share)


def _attempt(
    run: PlannedRun,
    recipe: Recipe,
    study: Path,
    train: Train,
    reporter: Callable[[str], Progress],
    clock: StudyClock,
) -> bool:
    """Train `run` if what it starts from is there and nobody else has it."""
    folder = study / run.name
    if run.after is not None and not (study / run.after / RESULT_FILE).exists():
        return False
    with claim(folder) as mine:
        if not mine or finished(run, study) or failure(run, study) is not None:
            return False
        config = run.config(study)
        if (folder / FAILED_FILE).exists():
            _clear(folder)
        if (folder / CONFIG_FILE).exists():
            write_json(folder / CONFIG_FILE, to_dict(config))  # `check_folders` let no more than a move pass
        progress = reporter(run.name)
        progress.note(f"run {recipe.runs.index(run) + 1} of {len(recipe.runs)}: {run.name}{begins_with(run)}")
        shown = _RunProgress(run, config.train.steps, progress, clock)
        try:
            train(config, folder, progress=shown, known=known_data(run, recipe, study))
        except DivergenceError as error:
            progress.note(f"{run.name} failed: {error}")
            return True
        clock.finish(run)
    return True


def _clear(folder: Path) -> None:
    """Remove what a run that failed left, but for the claim that this process holds on it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CLAIM_FILE:
            path.unlink()


def _holders(unfinished: list[PlannedRun], study: Path) -> str:
    return ", ".join(f"{run.name} ({holder(study / run.name)})" for run in unfinished if holder(study / run.name))


def state(run: PlannedRun, study: Path) -> str:
    """Say how far a run is, in a word."""
    if finished(run, study):
        return "finished"
    if failure(run, study) is not None:
        return "failed"
    return "begun" if (study / run.name / CONFIG_FILE).exists() else "missing"


def begins_with(run: PlannedRun) -> str:
    """Say behind a run's name which run it starts from, if from one."""
    return f", from {run.after}" if run.after else ""
