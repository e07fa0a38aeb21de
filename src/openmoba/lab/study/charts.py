"""The figures of a study, drawn from its finished runs into its folder `figures/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import LEVEL, Difference
from openmoba.lab.study import figures, panels
from openmoba.lab.study.answers import is_sweep
from openmoba.lab.study.candidates import Standing, standings
from openmoba.lab.study.figures import Curve, Level
from openmoba.lab.study.outcomes import (
    Cut,
    Outcome,
    arms_of,
    behind,
    by,
    difference,
    fit,
    fit_pair,
    gain,
    mean_loss,
    moba_settings,
    of_kind,
    of_stage,
    seed_noise,
)
from openmoba.lab.study.recipe import Recipe, Stage
from openmoba.records.figures import save

FOLDER = "figures"
EQUAL_COST = "causal_exact"
"""The convention of compute that shows what MoBA saves; scaling charts are drawn by it too."""
MOST_CURVES = 6  # that a reader can follow in one panel


@dataclass(frozen=True)
class Chart:
    """A drawn figure: its PNG and SVG file, the stage whose runs it shows, and what it says."""

    stage: Stage
    files: list[Path]
    caption: str


def draw_charts(recipe: Recipe, outcomes: Sequence[Outcome], study: Path, axis: str) -> list[Chart]:
    """Draw what each stage asks for, if its runs have a trailing loss, and its loss by position.

    Args:
        axis: compute convention of the scaling chart, a name in `AXES`.

    Raises:
        ValueError: unknown axis.
    """
    if axis not in AXES:
        raise ValueError(f"unknown axis {axis!r}; the compute conventions are {', '.join(AXES)}")
    charts = []
    for stage in recipe.stages:
        own = of_stage(stage, outcomes)
        sizes, trailing = by("size", own), all(run.has("trailing") for run in own)
        if stage.chart == "scaling" and sizes and trailing:
            charts.append(_scaling(stage, own, study, axis, f"{stage.name}-scaling-law"))
            if axis != EQUAL_COST:
                charts.append(_scaling(stage, own, study, EQUAL_COST, f"{stage.name}-scaling-law-equal-cost"))
        for size, runs in sizes.items():
            if stage.chart == "layers" and trailing and of_kind(runs, HYBRID):
                charts.append(_layers(stage, size, runs, study))
            if stage.chart == "compare" and trailing and (found := standings(runs)):
                charts.append(_candidates(stage, size, runs, found, study))
        if sizes and not is_sweep(own):
            charts.append(_gains(stage, own, study) if len(by("arm", own)) == 1 else _positions(stage, own, study))
        if trailing and (cut := [run for run in own if run.contexts]):
            charts.append(_contexts(stage, cut, study))
    return charts


def describe_trailing(outcome: Outcome) -> str:
    """Say which positions the trailing loss is of."""
    return f"length {outcome.config.data.length:,}, last {outcome.config.trailing:,} tokens"


def describe_sparsity(outcomes: Sequence[Outcome]) -> str:
    """Say MoBA's settings and how much of the longest context a query reads."""
    settings = [f"block {size}, top-{top_k} of {blocks} blocks" for size, top_k, blocks in moba_settings(outcomes)]
    return "; ".join(settings) or "full attention alone"


def _layers(stage: Stage, size: str, runs: list[Outcome], study: Path) -> Chart:
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    reference, noise = full or moba, seed_noise(runs, "trailing")

    def level(own: list[Outcome]) -> Level:
        found = difference(own, reference, "trailing", noise)
        if found is None:
            return Level(mean_loss(own, "trailing"))
        line = mean_loss(reference, "trailing")
        return Level(line + found.mean, found.interval and found.interval + line)

    hybrids = arms_of(runs, HYBRID)
    names, layers_name = _hybrid_names([own[0] for own in hybrids])
    figure = figures.layers_chart(
        dict(zip(names, map(level, hybrids), strict=True)),
        mean_loss(full, "trailing") if full else None,
        level(moba) if moba else None,
        title=f"Layer-wise hybrid, {_model(runs[0])}, {describe_sparsity(runs)}",
        layers_name=layers_name,
        loss_name=f"Trailing LM loss (nats)\n{describe_trailing(runs[0])}",
    )
    caption = f"Trailing loss over the layers with full attention ({size}; {behind(runs, 'trailing')})."
    if reference:
        caption += (
            f" Bars: {LEVEL:.0%} interval of the difference from {reference[0].label}, on the same windows: a bar "
            "that does not reach its line is resolved from it."
        )
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-{size}-layerwise-hybrid"), caption)


def _hybrid_names(hybrids: Sequence[Outcome]) -> tuple[list[str], str]:
    """Name the hybrids on the chart, all differently, and the axis: counts of last layers, or the arms."""
    layers = hybrids[0].layers
    counts = [len(run.full_layers) for run in hybrids]
    last = all(
        run.full_layers == frozenset(range((layers or 1000) - len(run.full_layers), layers or 1000)) for run in hybrids
    )
    if last and len(set(counts)) == len(counts):
        of = f" of {layers}" if layers else ""
        names = [f"{count} layer{'s' * (count != 1)}" for count in counts]
        return names, f"Number of full-attention layers (the last{of})"
    return [run.label for run in hybrids], "Arm, by its number of full-attention layers"


def _scaling(stage: Stage, runs: list[Outcome], study: Path, axis: str, name: str) -> Chart:
    arms, full = by("arm", runs).values(), of_kind(runs, FULL)
    laws = {own[0].label: fit(own, "trailing", axis) for own in arms}
    pairs = {own[0].label: fit_pair(own, full, "trailing", axis) for own in arms if full and own[0] != full[0]}
    figure = figures.scaling_chart(
        [_curve(seeds, axis) for own in arms for seeds in by("size", own).values()],
        {arm: law for arm, law in laws.items() if law},
        {arm: pair for arm, pair in pairs.items() if pair},
        title=f"Scaling law, {describe_sparsity(runs)}",
        loss_name=f"Trailing LM loss (nats)\n{describe_trailing(runs[0])}",
        axis=AXES[axis],
    )
    caption = (
        f"Trailing loss over compute by the convention {axis}: along the runs of each size (solid, mean of seeds), and "
        f"the fitted laws through their ends (dashed; {behind(runs, 'trailing')})."
    )
    if any(pairs.values()):
        caption += (
            f" Bands: pointwise {LEVEL:.0%} interval of a law's difference from that of full attention, over runs, "
            "documents and windows: a band that does not touch the red line is resolved from it."
        )
    return Chart(stage, save(figure, study / FOLDER / name), caption)


def _positions(stage: Stage, outcomes: list[Outcome], study: Path) -> Chart:
    """Draw the loss by position of the largest size's arms, and their differences from full attention."""
    size, runs = list(by("size", outcomes).items())[-1]
    arms = by("arm", runs)
    reference = of_kind(runs, FULL) or next(iter(arms.values()))
    shown = _most_telling(arms, reference)
    ranges = range(len(reference[0].ranges))
    differences = {
        own[0].label: [_level(difference(own, reference, k, seed_noise(runs, k))) for k in ranges]
        for own in shown
        if own != reference and _share_a_seed(own, reference)
    }
    name = _inside(reference[0].label)
    figure = panels.position_chart(
        reference[0].ranges,
        {own[0].label: [mean_loss(own, k) for k in ranges] for own in shown},
        differences,
        title=f"Loss by position, {_model(runs[0])}, length {runs[0].config.data.length:,}",
        loss_name="LM loss (nats)",
        difference_name=f"Difference from\n{name} (nats)",
    )
    caption = f"Loss by position ({size}), and the difference from {name} ({behind(runs, 0)})."
    if any(level.interval for levels in differences.values() for level in levels):
        caption = f"{caption} Bars: {LEVEL:.0%} interval, on the same windows."
    if len(shown) < len(arms):
        caption += f" Of {len(arms)} arms those with the lowest trailing loss are shown."
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-positions"), caption)


def _most_telling(arms: Mapping[str, list[Outcome]], reference: list[Outcome]) -> list[list[Outcome]]:
    """Pick the reference, MoBA, and of the others those with the lowest last range, in the order of the arms."""

    def rank(own: list[Outcome]) -> tuple[bool, float]:
        return own[0].label not in (reference[0].label, "MoBA"), mean_loss(own, len(own[0].ranges) - 1)

    kept = sorted(arms.values(), key=rank)[:MOST_CURVES]
    return [own for own in arms.values() if own in kept]


def _gains(stage: Stage, outcomes: list[Outcome], study: Path) -> Chart:
    """Draw the loss by position of every size of one arm, and its gain over the first range; of one length."""
    ranges = outcomes[0].ranges
    sizes = by("size", (outcome for outcome in outcomes if outcome.ranges == ranges))
    names = {size: f"{size}, {_model(own[0])}" for size, own in sizes.items()}
    span = f"{ranges[0][0]:,}-{ranges[0][1]:,}"
    figure = panels.position_chart(
        ranges,
        {names[size]: [mean_loss(own, k) for k in range(len(ranges))] for size, own in sizes.items()},
        {names[size]: [_level(gain(own, k, 0)) for k in range(len(ranges))] for size, own in sizes.items()},
        title=f"Loss by position, {_inside(outcomes[0].label)}, length {outcomes[0].config.data.length:,}",
        loss_name="LM loss (nats)",
        difference_name=f"Difference from\npositions {span} (nats)",
    )
    counts = "; ".join(f"{size}: {behind(own, 0)}" for size, own in sizes.items())
    caption = (
        f"Loss by position of {_inside(outcomes[0].label)}, and its difference from that at the positions {span} of "
        f"the same windows, with {LEVEL:.0%} intervals ({counts}). Below zero: what a longer context is good for."
    )
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-positions"), caption)


def _contexts(stage: Stage, outcomes: list[Outcome], study: Path) -> Chart:
    """Draw the trailing loss over the tokens in sight, of the largest size's arms, or every size of one arm."""
    key = "size" if len(by("arm", outcomes)) == 1 else "arm"
    runs = outcomes if key == "size" else list(by("size", outcomes).values())[-1]
    first = runs[0]
    groups = by(key, (run for run in runs if run.contexts == first.contexts))
    if key == "arm":
        shown = _most_telling(groups, of_kind(runs, FULL) or next(iter(groups.values())))
        groups = {own[0].label: own for own in shown}
    cuts = [Cut(context) for context in first.contexts]
    figure = panels.context_chart(
        [*first.contexts, first.config.data.length],
        {name: [*(mean_loss(own, cut) for cut in cuts), mean_loss(own, "trailing")] for name, own in groups.items()},
        {name: [_level(gain(own, cut, "trailing")) for cut in cuts] for name, own in groups.items()},
        title=f"Use of context, {_inside(first.label) if key == 'size' else _model(first)}",
        loss_name=f"Loss of the last\n{first.config.trailing:,} tokens (nats)",
        difference_name="Lost for want of\nmore context (nats)",
    )
    caption = (
        f"Loss of the last {first.config.trailing:,} tokens of the same windows over the tokens in sight, and what is "
        f"lost against all {first.config.data.length:,}, with {LEVEL:.0%} intervals ({behind(runs, 'trailing')}). "
        "Where a bar does not reach zero, what lies farther back counts."
    )
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-contexts"), caption)


def _candidates(stage: Stage, size: str, runs: list[Outcome], found: Sequence[Standing], study: Path) -> Chart:
    noise = seed_noise(runs, "trailing")
    base = mean_loss(of_kind(runs, FULL), "trailing")
    smallest = None if noise is None else 100 * noise.smallest_difference(1) / base
    figure = panels.candidates_chart(
        [standing.candidate for standing in found],
        smallest,
        title=f"Candidates, {_model(runs[0])}, {describe_trailing(runs[0])}",
        difference_name="Loss against full attention, on the same windows",
    )
    caption = (
        f"Every candidate's loss against full attention ({size}; {behind(runs, 'trailing')}). Bars: {LEVEL:.0%} "
        "interval of the paired difference. To the right: keys read over all layers, of those that full attention "
        f"reads, and training speed. The axis is to scale up to {panels.LINEAR_PERCENT:.0f} %."
    )
    if any(standing.own for standing in found):
        caption += " Diamonds: against full attention with the same key convolution."
    if noise is not None:
        caption += f" Grey: below {smallest:.2f} %, where two single seeds cannot be told apart."
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-{size}-candidates"), caption)


def _inside(label: str) -> str:
    """Write an arm's name inside a sentence: "Full attention" loses its capital, "MoBA" keeps it."""
    return label[:1].lower() + label[1:] if label[1:2].islower() else label


def _share_a_seed(first: Sequence[Outcome], second: Sequence[Outcome]) -> bool:
    return bool({run.run.seed for run in first} & {run.run.seed for run in second})


def _level(found: Difference | None) -> Level:
    assert found is not None, "position ranges have losses"
    return Level(found.mean, found.interval)


def _curve(seeds: Sequence[Outcome], axis: str) -> Curve:
    """Return the course of the runs of one arm and size, their mean over seeds."""
    compute = np.mean([[AXES[axis].value(row) for row in run.evals] for run in seeds], axis=0)
    loss = np.mean([[row["trailing_loss"] for row in run.evals] for run in seeds], axis=0)
    begun = compute > 0
    return Curve(seeds[0].label, _model(seeds[0]), compute[begun].tolist(), loss[begun].tolist())


def _model(run: Outcome) -> str:
    """Write the parameters without embeddings, as a person says them."""
    count = float(run.result["params"]["non_embedding"])
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g} {unit} parameters"
    return f"{count:.0f} parameters"
