"""A page of results: every study's question, figures and answers, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from openmoba.lab.arms import FULL
from openmoba.lab.columns import counted, short
from openmoba.lab.measure.needle_page import EDGE, chance, needle_sentences, read_needles
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study.answers.contexts import reach, use_of_context
from openmoba.lab.study.answers.stage import details
from openmoba.lab.study.answers.training import sweep, switches
from openmoba.lab.study.candidates import standing_table, standings
from openmoba.lab.study.charts import describe_arms
from openmoba.lab.study.compare import behind, mean_loss, speeds_apart
from openmoba.lab.study.groups import by, largest, of_kind
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.recipe import Stage
from openmoba.lab.study.report import REPORT_FILE, luck
from openmoba.lab.study.studies import Study, link
from openmoba.lab.study.tables import BOLD, comparisons
from openmoba.lab.study.words import size_name

NEEDLES = "needle.jsonl"
"""Record of `openmoba evaluate needle`, in a study's folder."""
HEADLINES = {
    "scaling": "Trailing loss over compute, with the fitted laws of MoBA and full attention",
    "layers": "Trailing loss over the number of full layers, between MoBA and full attention",
    "compare": "",
}
"""Stages that the first screens speak of, and what the charts show that the project is about."""


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
                source = f"[{study.recipe.title}]({link(study.folder / REPORT_FILE, page)})"
                weak = _weak_baseline(stage, study.runs(stage), studies)
                told = " ".join([f"{study.so_far}{answer}", *weak, f"{source}: {provenance(study.outcomes)}."])
                lines.append(f"- {told}")
                images += [f'<img src="{link(figures[0], page)}" width="49%" alt="{caption}">'] if caption else []
                break
    return "\n".join([" ".join(images), "", *lines, ""])


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
    report, recipe = (link(study.folder / name, page) for name in (REPORT_FILE, RECIPE_FILE))
    yield (
        f"{counted(len(study.outcomes), 'run')}: [report]({report}), [recipe]({recipe}), "
        f"`openmoba study RECIPE --out FOLDER`; {provenance(study.outcomes)}.\n"
    )


def _stage(study: Study, stage: Stage, runs: list[Outcome], studies: Sequence[Study], page: Path) -> Iterator[str]:
    """Write one stage: figures, arms and answer; folded up behind them, each number with its interval."""
    for figure in study.figures(stage):
        yield f"![{study.recipe.title}, stage {stage.name}]({link(figure, page)})\n"
    if arms := describe_arms(runs):
        yield f"{arms}\n"
    if stage != study.answering and (answer := study.answers[stage.name]):
        yield f"{answer}\n"
    if stage.beside is None:
        yield from (f"{sentence}\n" for sentence in _weak_baseline(stage, runs, studies))
    folded = [*(f"- {sentence}" for sentence in _numbers(study, stage, runs)), "", *_tables(stage, runs)]
    if any(folded):
        yield f"<details><summary>Stage {stage.name}, each number with its interval</summary>\n"
        yield from folded
        yield "</details>\n"


def _numbers(study: Study, stage: Stage, runs: list[Outcome]) -> Iterator[str]:
    """Say what stands behind the answer of a stage."""
    yield from details(stage, runs, study.axes(stage))
    if stage.chart == "scaling" and (apart := speeds_apart(runs)):
        yield f"Measured seconds do not compare here, since these runs are of {apart}."
    yield from sweep(stage, study.outcomes)
    if stage.chart in ("positions", "compare"):
        yield from switches(runs)
        if stage.beside is None:  # the stage beside it has said this
            yield from use_of_context(runs)
    yield from reach([run for run in runs if run.run.stage == stage])


def _tables(stage: Stage, runs: list[Outcome]) -> Iterator[str]:
    """Write the differences of a scaling study, and the candidates of a short list."""
    if rows := comparisons(runs) if stage.chart == "scaling" else []:
        yield f"Differences at the same size, on the same tokens ({behind(runs, 'trailing')}). {BOLD} {luck(runs)}\n"
        yield from (*rows, "")
    for own in by("size", runs).values() if stage.chart == "compare" else ():
        if found := standings(own):
            yield from (*standing_table(own, found), "")


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
            f"Full attention has not finished learning: its trailing loss is "
            f"{' and '.join(f'{loss:.3f}' for loss in losses)} after {full[0].config.train.steps:,} steps. The smaller "
            f"{size_name(own[0])} is at {mean_loss(own, 'trailing'):.3f} after {own[0].config.train.steps:,} "
            f"({study.recipe.title})."
        )


def _measured_on(run: Outcome) -> tuple[object, int, int]:
    return run.result["data"].get("valid"), run.config.data.length, run.config.trailing


def _needles(study: Study, page: Path) -> Iterator[str]:
    """Show the heat maps of the study's search for needles, if there was one, with what each model finds."""
    record = study.folder / NEEDLES
    if record.exists():
        searches = read_needles(record)
        maps, report = (link(record.with_suffix(suffix), page) for suffix in (".png", ".md"))
        yield f"![Needle in a haystack, {len(searches)} models of {study.recipe.title}]({maps})\n"
        yield from (f"- {sentence}" for sentence in needle_sentences(searches))
        yield f"- {EDGE}"
        yield f"- A guess has a loss of {chance(searches):.2f} nats; every length stands in the [table]({report}).\n"


def _by_arm_and_size(study: Study) -> Iterator[list[Outcome]]:
    for stage in study.recipe.stages:
        for own in by("size", study.runs(stage)).values():
            yield from by("arm", own).values()
