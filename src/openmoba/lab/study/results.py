"""A page of results: every study's question, figures and answer, and which setting to take, from the records alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from openmoba.lab.arms import FULL
from openmoba.lab.columns import counted, short
from openmoba.lab.measure.needle_page import EDGE, chance, needle_sentences, read_needles
from openmoba.lab.measure.resample import Difference
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study.answers import details, in_short, reach, sweep, switches, use_of_context
from openmoba.lab.study.candidates import speeds_not_compared, standing_table, standings, times_as_fast
from openmoba.lab.study.charts import FOLDER, describe_arm, describe_arms, law_axes
from openmoba.lab.study.outcomes import (
    Outcome,
    behind,
    by,
    difference,
    fair_full,
    largest,
    mean_loss,
    of_kind,
    of_stage,
    paired_loss,
    read_outcomes,
    seed_noise,
    speeds_apart,
)
from openmoba.lab.study.recipe import Recipe, Stage, read_recipe
from openmoba.lab.study.report import REPORT_FILE, luck
from openmoba.lab.study.tables import BOLD, comparisons
from openmoba.lab.study.words import in_percent, size_name, so_far
from openmoba.records.markdown import table

ORDER = ("positions", "compare", "scaling", "layers")
"""Charts in the order in which their questions build on each other."""
AXIS = "6nd"
"""The convention of compute that comes first; `law_axes` has the others."""
NEEDLES = "needle.jsonl"
"""Record of `openmoba evaluate needle`, in a study's folder."""
HEADLINES = {
    "scaling": "Trailing loss over compute, with the fitted laws of MoBA and full attention",
    "layers": "Trailing loss over the number of full layers, between MoBA and full attention",
    "compare": "",
}
"""Stages that the first screens speak of, and what the charts show that the project is about."""
BUDGETS = (0.1, 0.2, 0.35, 1.0)
"""Shares of the keys that a setting may read."""
ONE_SIZE = 0.1
"""Share of the largest model's parameters that another may lack and count as one size with it."""
PARTS = (8, 4, 2, 1)
"""Of the windows' length, the lengths that a setting is chosen for."""


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
        return law_axes(stage, self.runs(stage), AXIS) if stage.chart == "scaling" else [AXIS]

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


def experiments(studies: Sequence[Study], page: Path) -> str:
    """Write question, figures and answers of every study, as Markdown.

    Args:
        page: folder of the page, which links are relative to.
    """
    return "\n".join(line for study in studies for line in _experiment(study, studies, page))


def headlines(studies: Sequence[Study], page: Path) -> str:
    """Show the two charts side by side, and below them what the first stage of each kind says that says something."""
    images, lines = [], []
    for chart, caption in HEADLINES.items():
        for study, stage in ((found, stage) for found in studies for stage in found.recipe.stages):
            figures = study.figures(stage) if stage.chart == chart else []
            if answer := study.answers[stage.name] if figures else "":
                source = f"[{study.recipe.title}]({_link(study.folder / REPORT_FILE, page)})"
                weak = _weak_baseline(stage, study.runs(stage), studies)
                told = " ".join([f"{study.so_far}{answer}", *weak, f"{source}: {provenance(study.outcomes)}."])
                lines.append(f"- {told}")
                images += [f'<img src="{_link(figures[0], page)}" width="49%" alt="{caption}">'] if caption else []
                break
    return "\n".join([" ".join(images), "", *lines, ""])


def settings(studies: Sequence[Study], page: Path) -> str:
    """Say which setting to take, by length and by how many keys it may read, and on what it rests, as Markdown.

    A row is the arm with the lowest difference from full attention, in percent, at the last position range of that
    length, among the arms of the largest models that read no more keys than the budget; beside it the others of its
    model whose difference from it lies within noise. Empty without an arm that could be compared.
    """
    heads = ("length", "keys read at most", "setting", "against full attention, %", "with its key convolution, %",
             "not told apart", "keys read", "training speed", "measured with")  # fmt: skip
    rows, taken = [], []
    for groups in _largest_models(studies):
        length = groups[0][1][0].config.data.length
        for end in [length // part for part in PARTS]:
            arms = [arm for study, runs in groups for arm in _arms_at(end, study, runs)]
            for budget, best, alike in _best(arms):
                rows.append([f"{end:,}", *_cells(budget, best, alike, page)])
                taken.append((best.own, best.full))
    unlike = speeds_not_compared(taken)
    return "\n".join([*table(heads, rows), *(["", unlike] if unlike else []), ""]) if rows else ""


def limits(studies: Sequence[Study]) -> str:
    """Say what the studies do not show: how large, how long, on which documents, with how many seeds."""
    runs = [run for study in studies for run in study.outcomes]
    if not runs:
        return ""
    parameters = [run.parameters for run in runs]
    tokens, lengths = [run.config.tokens for run in runs], sorted({run.config.data.length for run in runs})
    each = [count / size for count, size in zip(tokens, parameters, strict=True)]
    epochs = max(run.result["data"]["epochs"] for run in runs)
    sources = dict.fromkeys(Path(run.config.data.source).name for run in runs)
    seeds = {len({run.run.seed for run in own}) for study in studies for own in _by_arm_and_size(study)}
    return (
        f"Models of {min(parameters):,} to {max(parameters):,} parameters without embeddings, at most {max(tokens):,} "
        f"training tokens a run, at most {epochs:.1f} epochs, {short(min(each))} to {short(max(each))} tokens for each "
        f"parameter, windows of {' and '.join(f'{length:,}' for length in lengths)} tokens, documents of "
        f"{', '.join(sources)}, {min(seeds)}{f' to {max(seeds)}' if max(seeds) > min(seeds) else ''} "
        f"seed{'s' * (max(seeds) > 1)} of a run. Nothing here says how the differences change beyond that: with larger "
        "models, more tokens, longer windows, other text, or other seeds.\n"
    )


def provenance(outcomes: Sequence[Outcome]) -> str:
    """Say the hardware, time and commit of some runs."""
    devices = dict.fromkeys((run.result["hardware"]["gpus"] or [run.result["hardware"]["cpu"]])[0] for run in outcomes)
    commits = dict.fromkeys(str(run.result["commit"])[:10] for run in outcomes)
    minutes = sum(run.result["seconds"] for run in outcomes) / 60
    return f"{' and '.join(devices)}, {minutes:.0f} minutes, commit {' and '.join(commits)}"


def _experiment(study: Study, studies: Sequence[Study], page: Path) -> Iterator[str]:
    yield f"### {study.recipe.title}\n"
    if study.recipe.question:
        yield f"**{study.recipe.question}**\n"
    if study.so_far or study.answering:
        yield f"{study.so_far}{study.answers[study.answering.name] if study.answering else ''}".strip() + "\n"
    for stage in study.recipe.stages:
        if runs := study.runs(stage):
            yield from _stage(study, stage, runs, studies, page)
    yield from _needles(study, page)
    report, recipe = (_link(study.folder / name, page) for name in (REPORT_FILE, RECIPE_FILE))
    yield (
        f"{counted(len(study.outcomes), 'run')}: [report]({report}), [recipe]({recipe}), "
        f"`openmoba study RECIPE --out FOLDER`; {provenance(study.outcomes)}.\n"
    )


def _stage(study: Study, stage: Stage, runs: list[Outcome], studies: Sequence[Study], page: Path) -> Iterator[str]:
    """Write one stage: figures, arms, answers, and the table of its candidates."""
    for figure in study.figures(stage):
        yield f"![{study.recipe.title}, stage {stage.name}]({_link(figure, page)})\n"
    if arms := describe_arms(runs):
        yield f"{arms}\n"
    if stage != study.answering and (answer := study.answers[stage.name]):
        yield f"- {answer}"
    yield from (f"- {sentence}" for sentence in details(stage, runs, study.axes(stage)))
    if stage.chart == "scaling" and (apart := speeds_apart(runs)):
        yield f"- Measured seconds do not compare here, since these runs are of {apart}."
    if stage.beside is None:
        yield from (f"- {sentence}" for sentence in _weak_baseline(stage, runs, studies))
    yield from (f"- {sentence}" for sentence in sweep(stage, study.outcomes))
    if stage.chart in ("positions", "compare"):
        yield from (f"- {sentence}" for sentence in switches(runs))
        if stage.beside is None:  # the stage beside it has said this
            yield from (f"- {sentence}" for sentence in use_of_context(runs))
    yield from (f"- {sentence}" for sentence in reach([run for run in runs if run.run.stage == stage]))
    yield ""
    if rows := comparisons(runs) if stage.chart == "scaling" else []:
        yield f"Differences at the same size, on the same tokens ({behind(runs, 'trailing')}). {BOLD} {luck(runs)}\n"
        yield from (*rows, "")
    for own in by("size", runs).values() if stage.chart == "compare" else ():
        if found := standings(own):
            yield from standing_table(own, found)
            yield ""


def _weak_baseline(stage: Stage, runs: list[Outcome], studies: Sequence[Study]) -> Iterator[str]:
    """Say of the full attention that arms are compared with that a smaller model of it ended lower, where one did.

    Of any study with the same validation documents and positions, however many of their windows were measured.
    """
    full = of_kind(largest(runs), FULL)
    if stage.after or len(by("arm", runs)) == 1 or not full or not full[0].has("trailing"):
        return
    smaller = [
        (study, own)
        for study in studies
        for other in study.recipe.stages
        for own in by("size", of_kind(study.runs(other), FULL)).values()
        if not other.after and _measured_on(own[0]) == _measured_on(full[0]) and own[0].has("trailing")
        if own[0].parameters < full[0].parameters
    ]
    losses = [run.loss("trailing") for run in full]
    study, own = min(smaller, key=lambda one: mean_loss(one[1], "trailing"), default=(None, full))
    if study is not None and mean_loss(own, "trailing") < min(losses):
        yield (
            f"Full attention is at a trailing loss of {' and '.join(f'{loss:.3f}' for loss in losses)} after "
            f"{full[0].config.train.steps:,} steps here, above the {mean_loss(own, 'trailing'):.3f} of the "
            f"smaller {size_name(own[0])} after {own[0].config.train.steps:,} ({study.recipe.title}; "
            f"{behind(own, 'trailing')}): it has not finished learning."
        )


def _measured_on(run: Outcome) -> tuple[object, int, int]:
    return run.result["data"].get("valid"), run.config.data.length, run.config.trailing


def _needles(study: Study, page: Path) -> Iterator[str]:
    """Show the heat maps of the study's search for needles, if there was one, with what each model finds."""
    record = study.folder / NEEDLES
    if record.exists():
        searches = read_needles(record)
        maps, report = (_link(record.with_suffix(suffix), page) for suffix in (".png", ".md"))
        yield f"![Needle in a haystack, {len(searches)} models of {study.recipe.title}]({maps})\n"
        yield from (f"- {sentence}" for sentence in needle_sentences(searches))
        yield f"- {EDGE}"
        yield f"- A guess has a loss of {chance(searches):.2f} nats; every length stands in the [table]({report}).\n"


@dataclass(frozen=True)
class _Setting:
    """An arm at one length, beside full attention of the same model.

    Attributes:
        own, full: its runs and those of full attention.
        number: of the position range before that length.
        against: paired difference in nats; loss: of full attention, which that is a part of.
        key_share: keys read up to that length, as a share of those that full attention reads.
    """

    study: Study
    runs: list[Outcome]
    own: list[Outcome]
    full: list[Outcome]
    number: int
    against: Difference
    loss: float
    key_share: float

    @property
    def percent(self) -> float:
        return 100 * self.against.mean / self.loss


def _largest_models(studies: Sequence[Study]) -> list[list[tuple[Study, list[Outcome]]]]:
    """Find for each length the largest models that several settings were compared on, those with most arms first.

    Sizes within `ONE_SIZE` of the largest are one. Models of one setting alone count where there are no others.
    """
    found: dict[int, list[tuple[Study, list[Outcome]]]] = {}
    for study, stage in ((one, stage) for one in studies for stage in one.recipe.stages):
        for runs in by("size", study.runs(stage)).values():
            full = of_kind(runs, FULL)
            if full and full[0].config.arm.key_conv is None:
                found.setdefault(runs[0].config.data.length, []).append((study, runs))
    chosen = []
    for _, groups in sorted(found.items()):
        groups.sort(key=lambda group: -len(by("arm", group[1])))
        several = [group for group in groups if len(by("arm", group[1])) > 2] or groups
        least = max(_parameters(runs) for _, runs in several) * (1 - ONE_SIZE)
        chosen.append([group for group in several if _parameters(group[1]) >= least])
    return chosen


def _parameters(runs: Sequence[Outcome]) -> int:
    """Return the parameters of full attention's model, without embeddings."""
    return of_kind(runs, FULL)[0].parameters


def _arms_at(end: int, study: Study, runs: list[Outcome]) -> Iterator[_Setting]:
    """Yield the arms that are compared with full attention at the positions before `end`."""
    full, ends = of_kind(runs, FULL), [stop for _, stop in runs[0].ranges]
    if end not in ends:
        return
    number = ends.index(end)
    for own in by("arm", runs).values():
        against, share = difference(own, full, number, seed_noise(runs, number)), own[0].key_share(end)
        if own != full and against is not None and share is not None:
            yield _Setting(study, runs, own, full, number, against, paired_loss(full, own, number), share)


def _best(arms: Sequence[_Setting]) -> Iterator[tuple[float, _Setting, list[str]]]:
    """Yield the best arm within each budget, each arm once, with those of its model that are not told apart from it."""
    last = None
    for budget in BUDGETS:
        within = [arm for arm in arms if arm.key_share <= budget]
        best = min(within, key=lambda arm: arm.percent, default=None)
        if best is None or best is last:
            continue
        last, noise = best, seed_noise(best.runs, best.number)
        others = [arm.own for arm in within if arm.runs is best.runs and arm is not best]
        apart = [(own, difference(own, best.own, best.number, noise)) for own in others]
        yield budget, best, [own[0].label for own, found in apart if found is not None and not found.resolved]


def _cells(budget: float, best: _Setting, alike: Sequence[str], page: Path) -> list[str]:
    speedup, behind_it = times_as_fast(best.own, best.full), behind(best.own, best.number)
    parameters, report = best.own[0].parameters, _link(best.study.folder / REPORT_FILE, page)
    return [
        f"{budget:.0%}", describe_arm(best.own[0]), in_percent(best.against, best.loss, sign=""),
        _in_percent_of_fair(best), ", ".join(alike), f"{best.key_share:.1%}",
        "-" if speedup is None else f"{speedup:.2f}x", f"[{parameters:,} parameters; {behind_it}]({report})",
    ]  # fmt: skip


def _in_percent_of_fair(best: _Setting) -> str:
    """Write the difference from full attention with the arm's key convolution; "" for an arm without."""
    own, fair = best.own, fair_full(best.own, best.runs)
    found = difference(own, fair, best.number, seed_noise(best.runs, best.number))
    if found is None and own[0].config.arm.key_conv is not None and own[0].config.arm.kind is not FULL:
        return "not known yet: it has no run"
    return "" if found is None else in_percent(found, paired_loss(fair, own, best.number), sign="")


def _by_arm_and_size(study: Study) -> Iterator[list[Outcome]]:
    for stage in study.recipe.stages:
        for own in by("size", study.runs(stage)).values():
            yield from by("arm", own).values()


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page)).as_posix()
