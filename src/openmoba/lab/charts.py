"""The figures of a study, drawn from its finished runs into its folder `figures/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openmoba.lab import figures
from openmoba.lab.figures import Curve, Level, PositionRange
from openmoba.lab.fit import LEVEL, Interval
from openmoba.lab.outcomes import Outcome, by, difference, fit, mean_loss, moba_settings, of_kind
from openmoba.lab.recipe import Recipe, Stage

FOLDER = "figures"


@dataclass(frozen=True)
class Chart:
    """A drawn figure: its PNG and SVG file, the stage whose runs it shows, and what it says."""

    stage: Stage
    files: list[Path]
    caption: str


def draw_charts(recipe: Recipe, outcomes: Sequence[Outcome], study: Path, axis: str) -> list[Chart]:
    """Draw what each stage asks for, if its runs have a trailing loss, and its largest model's loss by position.

    Args:
        axis: compute convention of the scaling chart, a key of `figures.AXES`.

    Raises:
        ValueError: unknown axis.
    """
    if axis not in figures.AXES:
        raise ValueError(f"unknown axis {axis!r}; the compute conventions are {', '.join(figures.AXES)}")
    charts = []
    for stage in recipe.stages:
        own = [outcome for outcome in outcomes if outcome.run.stage == stage]
        sizes, trailing = by("size", own), all(run.windows("trailing") for run in own)
        if stage.chart == "scaling" and sizes and trailing:
            charts.append(_scaling(stage, own, study, axis))
        for size, runs in sizes.items():
            if stage.chart == "layers" and trailing and any(run.config.arm.name == "hybrid" for run in runs):
                charts.append(_layers(stage, size, runs, study))
        if sizes:
            charts.append(_positions(stage, list(sizes.values())[-1], study))
    return charts


def describe_trailing(outcome: Outcome) -> str:
    """Which positions the trailing loss is of."""
    return f"length {outcome.config.data.length:,}, last {outcome.config.trailing:,} tokens"


def describe_sparsity(outcomes: Sequence[Outcome]) -> str:
    """MoBA's settings and how much of the longest context a query reads."""
    settings = [f"block {size}, top-{top_k} of {blocks} blocks" for size, top_k, blocks in moba_settings(outcomes)]
    return "; ".join(settings) or "full attention alone"


def _layers(stage: Stage, size: str, runs: list[Outcome], study: Path) -> Chart:
    full, moba = of_kind(runs, "full"), of_kind(runs, "moba")
    hybrids = by("arm", (run for run in runs if run.config.arm.name == "hybrid")).values()
    ordered = sorted(hybrids, key=lambda own: own[0].full_layers)
    names, layers_name = _hybrid_names([own[0] for own in ordered])
    figure = figures.layers_chart(
        dict(zip(names, (_level(own, moba) for own in ordered), strict=True)),
        _level(full, []) if full else None,
        _level(moba, full) if moba else None,
        title=f"Layer-wise hybrid, {_model(runs[0])}, {describe_sparsity(runs)}",
        layers_name=layers_name,
        loss_name=f"Trailing LM loss (nats)\n{describe_trailing(runs[0])}",
    )
    return Chart(
        stage,
        figures.save(figure, study / FOLDER / f"{stage.name}-{size}-layerwise-hybrid"),
        f"Trailing loss over the layers with full attention ({size}). Bars: {LEVEL:.0%} interval of "
        "the difference from MoBA; grey band: that of MoBA's difference from full attention; on the same windows.",
    )


def _hybrid_names(hybrids: Sequence[Outcome]) -> tuple[list[str], str]:
    """The hybrids' names on the chart, all different, and the axis' name: counts of last layers, or the arms."""
    full = [run.config.arm.full_layers for run in hybrids]
    if all(isinstance(layers, int) for layers in full) and len(set(full)) == len(full):
        return [str(layers) for layers in full], "Number of full-attention layers (the last ones)"
    return [run.label for run in hybrids], "Arm, by its number of full-attention layers"


def _scaling(stage: Stage, runs: list[Outcome], study: Path, axis: str) -> Chart:
    laws = {own[0].label: fit(own, "trailing", axis) for own in by("arm", runs).values()}
    figure = figures.scaling_chart(
        [_curve(run, axis) for run in runs],
        {arm: law for arm, law in laws.items() if law},
        title=f"Scaling law, {describe_sparsity(runs)}",
        loss_name=f"Trailing LM loss (nats)\n{describe_trailing(runs[0])}",
        axis=axis,
    )
    return Chart(
        stage,
        figures.save(figure, study / FOLDER / f"{stage.name}-scaling-law"),
        "Trailing loss along every run (solid) and the fitted laws through their ends (dashed), with the laws' "
        f"pointwise {LEVEL:.0%} bootstrap bands over runs and windows.",
    )


def _positions(stage: Stage, runs: list[Outcome], study: Path) -> Chart:
    arms = {own[0].label: _position_ranges(own) for own in by("arm", runs).values()}
    full = of_kind(runs, "full")
    reference = full[0].label if full else next(iter(arms))
    figure = figures.position_chart(
        arms,
        reference,
        title=f"Loss by position, {_model(runs[0])}, length {runs[0].config.data.length:,}",
        loss_name="LM loss (nats)",
    )
    caption = f"Loss by position ({runs[0].run.size}), and the difference from {reference[:1].lower()}{reference[1:]}."
    if len(stage.seeds) > 1:
        caption += " Bars: range over seeds."
    return Chart(
        stage,
        figures.save(figure, study / FOLDER / f"{stage.name}-positions"),
        caption,
    )


def _level(own: list[Outcome], reference: list[Outcome]) -> Level:
    """An arm's trailing loss; its bar is that of the paired difference from `reference`, if there is one."""
    loss = mean_loss(own, "trailing")
    against = difference(own, reference, "trailing")
    if against is None:
        return Level(loss)
    shift = loss - against.mean
    return Level(loss, Interval(against.interval.low + shift, against.interval.high + shift))


def _curve(run: Outcome, axis: str) -> Curve:
    rows = [row for row in run.evals if row["compute"][axis] > 0]
    return Curve(run.label, _model(run), [row["compute"][axis] for row in rows], [row["trailing_loss"] for row in rows])


def _position_ranges(own: list[Outcome]) -> list[PositionRange]:
    ranges = []
    for rows in zip(*(run.final["position_loss"] for run in own), strict=True):
        losses = [row["loss"] for row in rows]
        spread = Interval(min(losses), max(losses)) if len(losses) > 1 else None
        ranges.append(PositionRange(rows[0]["start"], rows[0]["end"], Level(sum(losses) / len(losses), spread)))
    return ranges


def _model(run: Outcome) -> str:
    """Parameters without embeddings, as a person says them."""
    count = float(run.result["params"]["non_embedding"])
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g}{unit} parameters"
    return f"{count:.0f} parameters"
