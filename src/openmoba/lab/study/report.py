"""`report.md` of a study: figures, tables, and what may be said of every comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path

from openmoba.lab.arms import FULL
from openmoba.lab.columns import counted
from openmoba.lab.measure.compute import AXES, Axis
from openmoba.lab.measure.resample import LEVEL
from openmoba.lab.run_files import FAILED_FILE, RESULT_FILE
from openmoba.lab.study.answers.contexts import reach, use_of_context
from openmoba.lab.study.answers.laws import slopes
from openmoba.lab.study.answers.stage import details, in_short
from openmoba.lab.study.answers.training import sweep, switches
from openmoba.lab.study.candidates import standing_table, standings
from openmoba.lab.study.charts import Chart, describe_arms, draw_charts, law_axes
from openmoba.lab.study.compare import behind, seed_noise, speeds_apart
from openmoba.lab.study.groups import by, moba_settings, of_kind, of_stage, references
from openmoba.lab.study.laws import LEAST_SIZES, Versus, comparable, fit, residual, slope_difference
from openmoba.lab.study.outcomes import Named, Outcome, read_outcomes, unrated
from openmoba.lab.study.rates import RATES_FILE
from openmoba.lab.study.recipe import Recipe, Stage
from openmoba.lab.study.tables import BOLD, comparisons, contexts
from openmoba.lab.study.words import LOSSES, bounds, inside, size_name, so_far
from openmoba.records.disk import write_text
from openmoba.records.locks import CLAIM_FILE, claim
from openmoba.records.markdown import table

REPORT_FILE = "report.md"

FEW = 4
"""Missing runs that a report names one by one."""

# Smallest model, its tokens, and the window of arXiv 2502.13189's scaling law.
REPORTED_PARAMETERS, REPORTED_TOKENS, REPORTED_LENGTH = 545e6, 10.8e9, 32768


def write_report(recipe: Recipe, study: Path, axis: str) -> list[Path]:
    """Draw the charts and write the report of the finished runs; returns the files, the report first.

    Of several processes that finish a study together, one writes; the others return the report alone, unless a run was
    finished after that one began.

    Args:
        axis: compute convention of the scaling charts and the fits.

    Raises:
        ValueError: no run is finished, or an unknown axis.
    """
    with claim(study) as mine:
        if mine:
            return _write(recipe, study, axis)
    if _newest_result(recipe, study) < (study / CLAIM_FILE).stat().st_mtime:
        return [study / REPORT_FILE]
    with claim(study, wait=True):
        return _write(recipe, study, axis)


def _write(recipe: Recipe, study: Path, axis: str) -> list[Path]:
    outcomes = read_outcomes(recipe, study)
    if not outcomes:
        raise ValueError(f"no run of {study} is finished; `openmoba study RECIPE --out {study}` trains them")
    charts = draw_charts(recipe, outcomes, study, axis)
    write_text(study / REPORT_FILE, "\n".join(_report(recipe, outcomes, charts, axis, study)) + "\n")
    return [study / REPORT_FILE, *(chart.files[0] for chart in charts)]


def _newest_result(recipe: Recipe, study: Path) -> float:
    """Return when the last run was finished, in seconds since the epoch; 0 if none is."""
    results = [study / run.name / RESULT_FILE for run in recipe.runs]
    return max((file.stat().st_mtime for file in results if file.exists()), default=0.0)


def fit_tables(recipe: Recipe, outcomes: Sequence[Outcome], axis: str) -> str:
    """Write the fitted laws of every scaling stage, as Markdown.

    Raises:
        ValueError: no stage has an arm with finished runs of three sizes, measured on two windows.
    """
    tables = [
        "\n".join([f"{stage.name}, compute by {AXES[axis].head}", "", *rows])
        for stage in recipe.stages
        if stage.chart == "scaling" and (own := of_stage(stage, outcomes)) and (rows := _fits(stage, own, axis))
    ]
    if not tables:
        raise ValueError(
            'a law needs finished runs of at least three sizes that the arms share, in a stage with chart = "scaling", '
            "measured on at least two windows"
        )
    return "\n\n".join(tables)


def _report(
    recipe: Recipe, outcomes: Sequence[Outcome], charts: Sequence[Chart], axis: str, study: Path
) -> Iterator[str]:
    yield f"# {recipe.title}"
    yield ""
    if recipe.question:
        yield f"**{recipe.question}**\n"
    yield from _setting(outcomes)
    if unfinished := so_far(recipe, outcomes):
        yield f"\n**{unfinished}**; what follows is of these alone. Missing: {missing(recipe, outcomes)}."
    diverged = [run.name for run in recipe.runs if (study / run.name / FAILED_FILE).exists()]
    if diverged:
        yield f"\n**Diverged**, and so without a loss here: {', '.join(diverged)}."
    if outcomes[0].rate:
        yield f"\nSeconds and tokens/s are of arms at their fastest micro-batch: [{RATES_FILE}]({RATES_FILE})."
    elif lacking := unrated(outcomes, study):
        yield f"\nSeconds and tokens/s are the runs' own, since {RATES_FILE} has no row for {', '.join(lacking)}."
    yield ""
    yield from _scale(recipe, outcomes)
    for stage in recipe.stages:
        if own := of_stage(stage, outcomes):
            drawn = [chart for chart in charts if chart.stage == stage]
            yield from _stage(stage, own, outcomes, drawn, axis, study)
    yield "\n## Provenance\n"
    yield from _provenance(outcomes)


def _stage(
    stage: Stage, own: Sequence[Outcome], outcomes: Sequence[Outcome], charts: Sequence[Chart], axis: str, study: Path
) -> Iterator[str]:
    """Write one stage: its charts, what its runs say, its tables."""
    yield f"\n## Stage {stage.name}\n"
    yield _stage_sentence(stage, own)
    yield f"\n{describe_arms(own)}"
    for chart in charts:
        yield f"\n![{chart.caption}]({chart.files[0].relative_to(study)})\n\n*{chart.caption}*"
    yield from _without_trailing(stage, own)
    axes = law_axes(stage, own, axis) if stage.chart == "scaling" else [axis]
    if short := in_short(stage, own, axes):
        yield f"\n**{short}**"
    said = (details(stage, own, axes), sweep(stage, outcomes), switches(own), use_of_context(own), reach(own))
    for sentence in chain(*said):
        yield f"\n{sentence}"
    if stage.chart == "compare":
        yield from _candidates(own)
    if rows := contexts(own):
        yield f"\n### Lost for want of context ({behind(own, 'trailing')})\n"
        yield (
            f"Loss of the last {own[0].config.trailing:,} tokens with so many in sight, minus that with all "
            f"{own[0].config.data.length:,}, in nats. {BOLD}\n"
        )
        yield from rows
    if rows := comparisons(own):
        yield f"\n### Comparisons ({behind(own, 'lm')})\n"
        yield f"{BOLD} {luck(own)}\n"
        yield from rows
    if stage.chart == "scaling":
        for convention in axes:
            yield from _laws(stage, own, convention, by_position=convention == axis)
    yield "\n### Runs\n"
    yield from _runs([outcome for outcome in own if outcome.run.stage == stage])


def _setting(outcomes: Sequence[Outcome]) -> Iterator[str]:
    first = outcomes[0]
    data, length = first.config.data, first.config.data.length
    settings = [f"blocks of {size}, top-{top_k} of {blocks} blocks" for size, top_k, blocks in moba_settings(outcomes)]
    moba = f"MoBA: {'; '.join(settings)}. " if settings else ""
    yield (
        f"Documents: {data.source}. Windows of {length:,} tokens from inside single documents, vocabulary "
        f"{first.result['data']['vocabulary']:,}. {moba}Losses in nats per token on held-out "
        f"documents ({behind([first], 'lm')} for a run); the trailing loss is that of the last "
        f"{first.config.trailing:,} positions. "
        f"Comparisons and laws count every window equally. "
        f"Sizes are named by their parameters without embeddings. "
        f"Compute in PFLOP/s-days (8.64e19 operations). All intervals: {LEVEL:.0%}, by a bootstrap over "
        "documents and their windows."
    )


def missing(recipe: Recipe, outcomes: Sequence[Outcome]) -> str:
    """Say what is not finished: stages, sizes, arms, seeds without a run; then runs by name, of many their count."""
    done, parts = {outcome.run.name for outcome in outcomes}, []
    for stage in recipe.stages:
        planned = [run for run in recipe.runs if run.stage == stage]
        finished = [run for run in planned if run.name in done]
        left = [run for run in planned if run.name not in done]
        if left and not finished:
            parts.append(f"all of stage {stage.name}")
            continue
        lacking = []
        for key in ("size", "arm", "seed"):
            there = {getattr(run, key) for run in finished}
            none = [value for value in dict.fromkeys(getattr(run, key) for run in left) if value not in there]
            if none:
                lacking.append(f"the {key}{'s' * (len(none) > 1)} {', '.join(map(str, none))}")
            left = [run for run in left if getattr(run, key) not in none]
        names = [run.name.removeprefix(f"{stage.name}/") for run in left]
        lacking += names if len(names) <= FEW else [f"{len(names)} others"]
        if lacking:
            parts.append(f"of stage {stage.name} {', '.join(lacking)}")
    return "; ".join(parts)


def _scale(recipe: Recipe, outcomes: Sequence[Outcome]) -> Iterator[str]:
    largest = max(outcomes, key=lambda outcome: outcome.parameters)
    parameters, length = largest.parameters, largest.config.data.length
    tokens = max(outcome.config.tokens for outcome in outcomes)
    yield "## What this study can and cannot show\n"
    yield (
        f"The largest model has {parameters:,} parameters without embeddings and the longest run reads "
        f"{tokens:,} tokens in windows of {length:,}. The smallest model of the MoBA report's scaling law has "
        f"{REPORTED_PARAMETERS:,.0f}, reads {REPORTED_TOKENS:,.0f} tokens, and its trailing loss is of windows of "
        f"{REPORTED_LENGTH:,}."
    )
    if parameters < REPORTED_PARAMETERS or length < REPORTED_LENGTH:
        yield (
            "\nIt can show that its arms train on the same data in the same order, that nothing but the attention "
            "differs, and how large their differences are *here*, against the noise measured here. It "
            "cannot confirm or refute the report's numbers: a fitted exponent holds inside the range of compute "
            "it was fitted in, and what a query loses by leaving out blocks depends on how much a model has "
            "learned to use from far away, which grows with training and length. Where a difference is within "
            "noise, these runs do not say that the systems are equal."
        )
    yield from _seeds(recipe, outcomes)


def _seeds(recipe: Recipe, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say what noise of seeds the intervals hold, by stage and size."""
    known, unknown = [], []
    for stage in recipe.stages:
        for own in by("size", of_stage(stage, outcomes)).values():
            noise, place = seed_noise(own, "lm"), f"{size_name(own[0])} in stage {stage.name}"
            if noise is None:
                unknown.append(place)
            else:
                several = [arm for arm, same in by("arm", own).items() if len(same) > 1]
                known.append(f"{place}: {noise.sd:.4f} nats between the seeds of {', '.join(several)}")
    if known:
        yield f"\nDifferences hold the noise of seeds, pooled over the arms with several ({'; '.join(known)}; LM loss)."
    if unknown:
        which = f" of {', '.join(unknown)}" if known else ""
        yield (
            f"\nEvery run{which} was trained with one seed. Intervals are over documents and windows alone and do not "
            "hold the luck of initialisation and of the order of data; differences of a few hundredths of a nat may "
            "change sign with another seed."
        )


def _stage_sentence(stage: Stage, compared: Sequence[Outcome]) -> str:
    outcomes = [outcome for outcome in compared if outcome.run.stage == stage]
    loss_tokens = outcomes[0].config.train.loss_tokens
    parts = [counted(len(outcomes), "run")]
    if stage.beside:
        arms = dict.fromkeys(run.label for run in compared if run.run.stage != stage)
        parts.append(f"compared with {', '.join(arms)} of stage {stage.beside}")
    if stage.after:
        parts.append(f"each from its own arm of stage {stage.after}")
        new = [run.run.arm for run in outcomes if run.run.after and f"-{run.run.arm}-seed" not in run.run.after]
        if new:
            parts[-1] += f", {', '.join(dict.fromkeys(new))} from that of {stage.branch}"
    if loss_tokens:
        parts.append(f"trained with the loss on the last {loss_tokens:,} tokens of each window alone")
    if stage.after:
        parts.append("tokens and compute are those of this stage alone")
    return "; ".join(parts) + "."


def luck(outcomes: Sequence[Outcome]) -> str:
    """Say which differences do not hold the luck of a seed."""
    alone = [size_name(runs[0]) for runs in by("size", outcomes).values() if seed_noise(runs, "lm") is None]
    if not alone:
        return "All intervals hold the noise of seeds."
    which = "" if len(alone) == len(by("size", outcomes)) else f" of {', '.join(alone)}"
    return f"The intervals{which} are of one seed, whose luck they do not hold."


def _without_trailing(stage: Stage, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say why a stage lacks a trailing loss, and with it the chart that it asks for."""
    short = [outcome for outcome in outcomes if not outcome.has("trailing")]
    if short:
        chart = f"; the {stage.chart} chart, which shows it, is left out" if stage.chart != "positions" else ""
        yield (
            f"\nThere is no trailing loss of {len(short)} of these runs, since none of their validation windows "
            f"reaches data.length={short[0].config.data.length:,}{chart}."
        )


def _candidates(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for runs in by("size", outcomes).values():
        found = standings(runs)
        if found:
            yield f"\n### Candidates ({size_name(runs[0])}; {behind(runs, 'trailing')})\n"
            yield from standing_table(runs, found)


def _laws(stage: Stage, outcomes: Sequence[Outcome], axis: str, by_position: bool) -> Iterator[str]:
    """Write the laws by one convention of compute: of both losses, and of each position range beside full attention."""
    rows, same = _fits(stage, outcomes, axis), comparable(outcomes)
    if not rows:
        return
    yield f"\n### Fitted laws, L = a · C^b, C by {AXES[axis].head} ({behind(same, 'trailing')})\n"
    if len(same) < len(outcomes):
        yield (
            f"Laws are of the sizes and seeds that every arm with {LEAST_SIZES} sizes has, "
            f"{len(same)} of these {len(outcomes)} runs.\n"
        )
    yield from rows
    full = of_kind(same, FULL)
    for own in by("arm", same).values():
        for other in references(own, same) if own != full else ():
            if sentences := list(slopes(own, other, axis)):
                yield ""
                yield from (f"- {sentence}" for sentence in sentences)
                if by_position:
                    yield from _position_laws(own, other, axis)


def _fits(stage: Stage, outcomes: Sequence[Outcome], axis: str) -> list[str]:
    law_axes(stage, outcomes, axis)  # seconds that do not compare are an error
    rows = []
    for own in by("arm", comparable(outcomes)).values():
        for kind, name in LOSSES.items():
            law = fit(own, kind, axis)
            if law is not None:
                rows.append(
                    [own[0].label, name, f"{law.law.a:#.4g} [{law.a.low:#.4g}, {law.a.high:#.4g}]",
                     f"{law.law.b:+.4f}{bounds(law.b)}", str(len(law.loss)), f"{residual(law):.1%}"]
                )  # fmt: skip
    return table(["arm", "loss", "a", "b", "runs", "largest residual"], rows) if rows else []


def _position_laws(own: Sequence[Outcome], full: Sequence[Outcome], axis: str) -> Iterator[str]:
    """Yield both arms' laws of every position range, and the interval of their exponents' difference."""
    other = inside(full[0].label)
    yield f"\n{own[0].label} and {other} by position ({behind(own, 0)}):\n"
    rows = []
    for number, (start, end) in enumerate(own[0].ranges):
        if found := Versus.of(own, full, number, axis):
            laws = [text for law in found.laws for text in (f"{law.law.a:#.4g}", f"{law.law.b:+.4f}{bounds(law.b)}")]
            apart, worst = bounds(slope_difference(*found.laws)).strip(), f"{residual(*found.laws):.1%}"
            rows.append([f"{start:,}-{end:,}", *laws, apart, worst])
    name = own[0].label
    heads = ["positions", f"{name} a", f"{name} b", f"{other} a", f"{other} b", "difference of b", "largest residual"]
    yield from table(heads, rows)


def _runs(outcomes: Sequence[Outcome]) -> Iterator[str]:
    if apart := speeds_apart(outcomes):
        yield f"Measured seconds, tokens/s and MFU do not compare here, since these runs are of {apart}.\n"
    rows = []
    for run in outcomes:
        compute = [_compute_cell(run, axis) for axis in AXES.values()]
        losses = [_loss_cell(run, kind) for kind in LOSSES]
        rows.append(
            [run.run.size, run.label, str(run.run.seed), f"{run.parameters:,}",
             f"{run.result['tokens']:,}", _epochs(run), *losses, *compute,
             f"{run.tokens_per_second:,.0f}", "-" if run.mfu is None else f"{run.mfu:.0%}"]
        )  # fmt: skip
    heads = ["size in the recipe", "arm", "seed", "parameters without embeddings", "tokens", "epochs", *LOSSES.values()]
    yield from table([*heads, *(axis.head for axis in AXES.values()), "tokens/s", _mfu_head(outcomes)], rows)


def _epochs(run: Outcome) -> str:
    """Write how often the run read its documents; of the first records, which do not say, a dash."""
    epochs = run.result["data"].get("epochs")
    return "-" if epochs is None else f"{epochs:.2f}"


def _mfu_head(outcomes: Sequence[Outcome]) -> str:
    """Name MFU with what it is a share of: the data sheet's rate, where `bench training` divides by a measured one."""
    peaks = {peak for run in outcomes if (peak := (run.result.get("speed") or {}).get("peak"))}
    rate = f"{peaks.pop() / 1e12:,.0f} TFLOP/s, the data sheet's" if len(peaks) == 1 else "the data sheet's rate"
    return f"MFU of {rate}"


def _compute_cell(run: Outcome, axis: Axis) -> str:
    """Write the run's compute; of records from before it was counted, a dash."""
    return f"{axis.value(run.final):{axis.form}}" if axis.known(run.final) else "-"


def _loss_cell(run: Outcome, kind: Named) -> str:
    if not run.has(kind):
        return "-"
    interval = run.final["intervals"][kind]
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{run.loss(kind):.4f}{bounds}"


def _provenance(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for name, values in (
        ("Commit", (str(run.result["commit"]) for run in outcomes)),
        ("Hardware", (_hardware(run) for run in outcomes)),
        ("Versions", (", ".join(f"{k} {v}" for k, v in run.result["versions"].items()) for run in outcomes)),
    ):
        yield f"- {name}: {'; '.join(dict.fromkeys(values))}"
    documents = dict.fromkeys(
        f"training {run.result['data']['train'][:12]}, validation {run.result['data']['valid'][:12]}"
        for run in outcomes
        if "train" in run.result["data"]
    )
    if documents:
        yield f"- Digests of the documents: {'; '.join(documents)}"
    if older := sum("train" not in run.result["data"] for run in outcomes):
        yield f"- {older} of {len(outcomes)} runs are older than the record of their data"
    yield f"- Training and evaluation, all runs: {sum(run.result['seconds'] for run in outcomes) / 60:.1f} minutes"


def _hardware(run: Outcome) -> str:
    hardware = run.result["hardware"]
    gpus = [f"{len(list(same))} x {name}" for name, same in groupby(hardware["gpus"])]
    return ", ".join([*gpus, f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"])
