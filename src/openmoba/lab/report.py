"""`report.md` of a study: figures, tables, and what may be said of every comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from openmoba.lab.charts import Chart, draw_charts
from openmoba.lab.claims import claim
from openmoba.lab.fit import LEVEL, Difference, Fit, Interval
from openmoba.lab.outcomes import (
    Loss,
    Outcome,
    by,
    difference,
    fit,
    moba_settings,
    of_kind,
    position_fits,
    read_outcomes,
    slope_difference,
)
from openmoba.lab.recipe import Recipe, Stage
from openmoba.lab.records import write_text

REPORT_FILE = "report.md"
LOSSES: dict[Loss, str] = {"lm": "LM loss", "trailing": "trailing loss"}

# Smallest model, its tokens, and the window of arXiv 2502.13189's scaling law.
REPORTED_PARAMETERS, REPORTED_TOKENS, REPORTED_LENGTH = 545e6, 10.8e9, 32768


def write_report(recipe: Recipe, study: Path, axis: str) -> list[Path]:
    """Draw the charts and write the report of the finished runs; returns the files, the report first.

    Of several processes that finish a study together, one writes; the others return the report alone.

    Args:
        axis: compute convention of the scaling charts and the fits.

    Raises:
        ValueError: no run is finished, or an unknown axis.
    """
    outcomes = read_outcomes(recipe, study)
    if not outcomes:
        raise ValueError(f"no run of {study} is finished; `openmoba study RECIPE --out {study}` trains them")
    with claim(study) as mine:
        if not mine:
            return [study / REPORT_FILE]
        charts = draw_charts(recipe, outcomes, study, axis)
        write_text(study / REPORT_FILE, "\n".join(_report(recipe, outcomes, charts, axis, study)) + "\n")
    return [study / REPORT_FILE, *(chart.files[0] for chart in charts)]


def fit_tables(recipe: Recipe, outcomes: Sequence[Outcome], axis: str) -> str:
    """The fitted laws of every scaling stage, as Markdown.

    Raises:
        ValueError: no stage has an arm with two finished runs of different compute.
    """
    tables = [
        "\n".join([f"{stage.name}, compute by the convention {axis}", "", *rows])
        for stage in recipe.stages
        if stage.chart == "scaling" and (rows := _fits(_of(stage, outcomes), axis))
    ]
    if not tables:
        raise ValueError(
            'a law needs finished runs of at least two sizes of one arm, in a stage with chart = "scaling"'
        )
    return "\n\n".join(tables)


def _report(
    recipe: Recipe, outcomes: Sequence[Outcome], charts: Sequence[Chart], axis: str, study: Path
) -> Iterator[str]:
    yield f"# {recipe.title}"
    yield ""
    yield from _setting(outcomes)
    if len(outcomes) < len(recipe.runs):
        yield f"\n**{len(outcomes)} of {len(recipe.runs)} runs are finished**; what follows is of these alone."
    yield ""
    yield from _scale(outcomes)
    for stage in recipe.stages:
        own = _of(stage, outcomes)
        if not own:
            continue
        yield f"\n## Stage {stage.name}\n"
        yield _stage_sentence(stage, own)
        for chart in (chart for chart in charts if chart.stage == stage):
            yield f"\n![{chart.caption}]({chart.files[0].relative_to(study)})\n\n*{chart.caption}*"
        yield from _without_trailing(stage, own)
        yield from _use_of_context(own)
        yield "\n### Comparisons\n"
        yield from _comparisons(own)
        if stage.chart == "scaling":
            yield from _laws(own, axis)
        yield "\n### Runs\n"
        yield from _runs(own)
    yield "\n## Provenance\n"
    yield from _provenance(outcomes)


def _setting(outcomes: Sequence[Outcome]) -> Iterator[str]:
    first = outcomes[0]
    data, length, windows = first.config.data, first.config.data.length, len(first.windows("lm"))
    settings = [f"blocks of {size}, top-{top_k} of {blocks} blocks" for size, top_k, blocks in moba_settings(outcomes)]
    moba = f"MoBA: {'; '.join(settings)}. " if settings else ""
    yield (
        f"Documents: {data.source}. Windows of {length:,} tokens from inside single documents, vocabulary "
        f"{first.result['data']['vocabulary']:,}. {moba}Losses in nats per token on {windows} validation windows of "
        f"held-out documents; the trailing loss is that of the last {first.config.trailing:,} positions. "
        f"Comparisons and laws count every window equally. "
        f"Compute in PFLOP/s-days (8.64e19 operations). All intervals: {LEVEL:.0%}, bootstrap."
    )


def _scale(outcomes: Sequence[Outcome]) -> Iterator[str]:
    largest = max(outcomes, key=lambda outcome: float(outcome.result["params"]["non_embedding"]))
    parameters, length = largest.result["params"]["non_embedding"], largest.config.data.length
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
            "\nIt can show that the three systems train on the same data in the same order, that nothing but the "
            "attention differs, and how large their differences are *here*, against the noise measured here. It "
            "cannot confirm or refute the report's numbers: a fitted exponent holds inside the range of compute "
            "it was fitted in, and what a query loses by leaving out blocks depends on how much a model has "
            "learned to use from far away, which grows with training and length. Where a difference is within "
            "noise, these runs do not say that the systems are equal."
        )
    yield from _seeds(outcomes)


def _seeds(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Over how many seeds the intervals are, by stage where that differs."""
    stages: dict[str, set[int]] = {}
    for outcome in outcomes:
        stages.setdefault(outcome.run.stage.name, set()).add(outcome.run.seed)
    counts = {name: len(seeds) for name, seeds in stages.items()}
    if max(counts.values()) > 1:
        several = ", ".join(f"{count} in stage {name}" for name, count in counts.items())
        seeds = f"the {max(counts.values())} seeds" if len(set(counts.values())) == 1 else f"the seeds ({several})"
        yield f"\nIntervals are over validation windows and over {seeds} of a run."
    if min(counts.values()) == 1:
        single = [name for name, count in counts.items() if count == 1]
        runs = "Every run" if len(single) == len(counts) else f"Every run of stage {', '.join(single)}"
        yield (
            f"\n{runs} was trained with one seed. Intervals are over validation windows alone and do not hold the "
            "luck of initialisation and of the order of data; differences of a few hundredths of a nat may "
            "change sign with another seed."
        )


def _stage_sentence(stage: Stage, outcomes: Sequence[Outcome]) -> str:
    loss_tokens = outcomes[0].config.train.loss_tokens
    parts = [f"{len(outcomes)} runs"]
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


def _without_trailing(stage: Stage, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Why a stage lacks a trailing loss, and with it the chart that it asks for."""
    short = [outcome for outcome in outcomes if not outcome.windows("trailing")]
    if short:
        chart = f"; the {stage.chart} chart, which shows it, is left out" if stage.chart else ""
        yield (
            f"\nThere is no trailing loss of {len(short)} of these runs, since none of their validation windows "
            f"reaches data.length={short[0].config.data.length:,}{chart}."
        )


def _use_of_context(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What full attention gains from a longer context, the most that leaving blocks out could cost."""
    full = of_kind(list(by("size", outcomes).values())[-1], "full")
    if not full or len(full[0].final["position_loss"]) < 3:
        return
    ranges = list(zip(*(run.final["position_loss"] for run in full), strict=True))
    (early, early_loss), (late, late_loss) = (
        (rows[0], sum(row["loss"] for row in rows) / len(rows)) for rows in (ranges[1], ranges[-1])
    )
    span, before = (f"{row['start']:,}-{row['end']:,}" for row in (late, early))
    yield (
        f"\nUse of context: with full attention ({full[0].run.size}) the loss at positions {span} differs from that at "
        f"{before} by {late_loss - early_loss:+.4f} nats. The lower, the more the model gains from far context, and "
        "the more it can lose by leaving blocks out."
    )


def _comparisons(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A sentence on every arm against full attention, and on every other against MoBA, by size and loss."""
    for runs in by("size", outcomes).values():
        full, moba = of_kind(runs, "full"), of_kind(runs, "moba")
        for reference in (full, moba):
            for own in by("arm", runs).values():
                if not reference or own[0].config.arm.name in ("full", reference[0].config.arm.name):
                    continue
                for kind in LOSSES:
                    found = difference(own, reference, kind)
                    if found is not None:
                        yield f"- {_verdict(own[0], reference[0], kind, found)}"


def _verdict(own: Outcome, reference: Outcome, kind: Loss, found: Difference) -> str:
    way = "above" if found.mean > 0 else "below"
    seeds, windows = len(found.per_seed), len(own.windows(kind))
    measured = f"{found.interval.low:+.4f} to {found.interval.high:+.4f} over {windows} windows"
    if seeds > 1:
        measured += f" and {seeds} seeds; by seed {', '.join(f'{value:+.4f}' for value in found.per_seed)}"
    return (
        f"{own.run.size}, {LOSSES[kind]}: {own.label} is {abs(found.mean):.4f} nats {way} "
        f"{reference.label} ({measured}): {_word(found.resolved, seeds)}."
    )


def _laws(outcomes: Sequence[Outcome], axis: str) -> Iterator[str]:
    rows = list(_fits(outcomes, axis))
    if not rows:
        return
    yield f"\n### Fitted laws, L = a · C^b, C by the convention {axis}\n"
    yield from rows
    full, moba = of_kind(outcomes, "full"), of_kind(outcomes, "moba")
    if not (full and moba):
        return
    for kind, name in LOSSES.items():
        laws = fit(moba, kind, axis), fit(full, kind, axis)
        if laws[0] and laws[1] and len(laws[0].compute) == len(laws[1].compute):
            yield f"\n- {_slopes(name, slope_difference(laws[0], laws[1]), len({run.run.seed for run in full}))}"
    yield from _position_laws(moba, full, axis)


def _slopes(name: str, found: Interval, seeds: int) -> str:
    return (
        f"{name[:1].upper()}{name[1:]}: MoBA's exponent minus full attention's lies in {found.low:+.4f} to "
        f"{found.high:+.4f}: {_word(0.0 not in found, seeds)}."
    )


def _word(resolved: bool, seeds: int) -> str:
    if not resolved:
        return "**within noise**"
    return "**resolved**" if seeds > 1 else "**resolved on these windows**, for this one seed"


def _fits(outcomes: Sequence[Outcome], axis: str) -> list[str]:
    rows = []
    for own in by("arm", outcomes).values():
        for kind, name in LOSSES.items():
            law = fit(own, kind, axis)
            if law is not None:
                worst = float(abs(law.residual).max())
                rows.append(
                    [own[0].label, name, f"{law.law.a:.4g} [{law.a.low:.4g}, {law.a.high:.4g}]",
                     f"{law.law.b:.4f} [{law.b.low:.4f}, {law.b.high:.4f}]", str(len(law.loss)), f"{worst:.2%}"]
                )  # fmt: skip
    return list(_table(["arm", "loss", "a", "b", "runs", "largest residual"], rows)) if rows else []


def _position_laws(moba: Sequence[Outcome], full: Sequence[Outcome], axis: str) -> Iterator[str]:
    def text(law: Fit | None) -> list[str]:
        return [f"{law.law.a:.4g}", f"{law.law.b:.4f}"] if law else ["", ""]

    yield "\nBy position:\n"
    pairs = zip(position_fits(moba, axis), position_fits(full, axis), strict=True)
    rows = [[f"{start:,}-{end:,}", *text(first), *text(second)] for (start, end, first), (_, _, second) in pairs]
    yield from _table(["positions", "MoBA a", "MoBA b", "full a", "full b"], rows)


def _runs(outcomes: Sequence[Outcome]) -> Iterator[str]:
    rows = []
    for run in outcomes:
        compute, losses = run.final["compute"], [_loss_cell(run, kind) for kind in LOSSES]
        conventions = [f"{compute[name]:.3g}" for name in ("6nd", "chinchilla", "causal_exact")]
        rows.append(
            [run.run.size, run.label, str(run.run.seed), f"{run.result['params']['non_embedding']:,}",
             f"{run.result['tokens']:,}", *losses, *conventions, f"{compute['accelerator_seconds']:.0f}"]
        )  # fmt: skip
    heads = ["size", "arm", "seed", "parameters without embeddings", "tokens", *LOSSES.values()]
    yield from _table([*heads, "6ND", "Chinchilla", "causal-exact", "accelerator s"], rows)


def _loss_cell(run: Outcome, kind: Loss) -> str:
    if not run.windows(kind):
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


def _of(stage: Stage, outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.run.stage == stage]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join(' --- ' for _ in heads)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
