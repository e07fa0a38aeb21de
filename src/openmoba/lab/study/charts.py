"""The figures of a study, drawn from its finished runs into its folder `figures/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.columns import counted
from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import LEVEL, Difference
from openmoba.lab.study import figures, panels
from openmoba.lab.study.candidates import Standing, standings
from openmoba.lab.study.compare import behind, difference, gain, mean_loss, seed_noise, speeds_apart
from openmoba.lab.study.figures import Curve, Level
from openmoba.lab.study.groups import (
    arms_of,
    by,
    largest,
    moba_settings,
    of_kind,
    of_same_seeds,
    of_stage,
    share_a_seed,
)
from openmoba.lab.study.laws import LEAST_SIZES, comparable, fit, fit_pair
from openmoba.lab.study.looks import arm_looks, by_parameters, size_looks
from openmoba.lab.study.outcomes import Cut, Named, Outcome
from openmoba.lab.study.rates import RATES_FILE
from openmoba.lab.study.recipe import Recipe, Stage
from openmoba.lab.study.words import inside, size_name
from openmoba.records.figures import save

FOLDER = "figures"
EQUAL_COST = "causal_exact"
SECONDS = "accelerator_seconds"
"""The conventions of compute that show what MoBA saves; scaling charts are drawn by them too."""
SCALING = {EQUAL_COST: "-equal-cost", SECONDS: "-seconds"}
"""Convention -> what the name of its scaling chart ends in; that of the chosen one ends in nothing."""
ENDS = ("-scaling-law", *(f"-scaling-law{end}" for end in SCALING.values()), "-layerwise-hybrid", "-candidates",
        "-positions", "-contexts")  # fmt: skip
"""What the names of charts end in; before it stands the stage's name, and the size's where there is one for each."""
FASTEST = "Accelerator time, each arm at its fastest micro-batch"
"""Caption of the axis of seconds where they are not those of the runs."""
MOST_CURVES = 6  # that a reader can follow in one panel


@dataclass(frozen=True)
class Chart:
    """A drawn figure: its PNG and SVG file, the stage whose runs it shows, and what it says."""

    stage: Stage
    files: list[Path]
    caption: str


def draw_charts(recipe: Recipe, outcomes: Sequence[Outcome], study: Path, axis: str) -> list[Chart]:
    """Draw what each stage asks for, if its runs have a trailing loss, and its loss by position; no chart else stays.

    Args:
        axis: compute convention of the scaling chart, a name in `AXES`.

    Raises:
        ValueError: unknown axis, or measured seconds of runs whose speeds do not compare.
    """
    if axis not in AXES:
        raise ValueError(f"unknown axis {axis!r}; the compute conventions are {', '.join(AXES)}")
    charts = []
    for stage in recipe.stages:
        own = of_stage(stage, outcomes)
        sizes, trailing = by("size", own), all(run.has("trailing") for run in own)
        if stage.chart == "scaling" and sizes and trailing:
            charts += _scalings(stage, own, study, axis)
        for size, runs in sizes.items():
            if stage.chart == "layers" and trailing and of_kind(runs, HYBRID):
                charts.append(_layers(stage, size, runs, study))
            if stage.chart == "compare" and trailing and (found := standings(runs)):
                charts.append(_candidates(stage, size, runs, found, study))
        if sizes and not any(run.run.sweep for run in own):
            charts.append(_gains(stage, own, study) if len(by("arm", own)) == 1 else _positions(stage, own, study))
        if trailing and (cut := [run for run in own if run.contexts]):
            charts.append(_contexts(stage, cut, study))
    _remove_others(recipe, study, {file.stem for chart in charts for file in chart.files})
    return charts


def _remove_others(recipe: Recipe, study: Path, drawn: set[str]) -> None:
    """Remove the charts of earlier calls that are drawn no more: they would be shown beside the others."""
    for path in (study / FOLDER).glob("*.*"):
        ours = any(path.stem.startswith(f"{stage.name}-") for stage in recipe.stages) and path.stem.endswith(ENDS)
        if ours and path.stem not in drawn and path.suffix in (".png", ".svg"):
            path.unlink()


def law_axes(stage: Stage, outcomes: Sequence[Outcome], axis: str) -> list[str]:
    """Return the conventions by which the runs of a stage are compared at equal cost, the chosen one first.

    Measured seconds are left out where the speeds of the runs do not compare.

    Raises:
        ValueError: they were chosen all the same.
    """
    apart = speeds_apart(outcomes)
    if apart and axis == SECONDS:
        raise ValueError(
            f"the runs of stage {stage.name} are of {apart}, so their seconds do not compare; choose another --axis, "
            "or train them again in one place"
        )
    return [name for name in dict.fromkeys((axis, *SCALING)) if not (apart and name == SECONDS)]


def describe_arms(outcomes: Sequence[Outcome]) -> str:
    """Say of every arm its name and what it attends with, in the largest of its models; nothing of a single arm."""
    arms = [own[-1] for own in by("arm", outcomes).values()]
    hybrids = by("size", (run for run in arms if run.config.arm.kind is HYBRID))
    at = (
        f", layers of {' and '.join(size_name(own[0]) for own in hybrids.values())}"
        if hybrids and len(by("size", outcomes)) > 1
        else ""
    )
    return f"Arms{at}: {'; '.join(map(describe_arm, arms))}." if len(arms) > 1 else ""


def describe_arm(run: Outcome) -> str:
    """Say an arm's name and its settings."""
    settings = run.config.arm.settings(run.layers, run.config.train.steps)
    return ": ".join(filter(None, (run.label, settings)))


def describe_trailing(outcome: Outcome) -> str:
    """Say which positions the trailing loss is of."""
    return f"length {outcome.config.data.length:,}, last {outcome.config.trailing:,} tokens"


def describe_sparsity(outcomes: Sequence[Outcome]) -> str:
    """Say MoBA's settings and how much of the longest context a query reads."""
    settings = [f"block {size}, top-{top_k} of {blocks} blocks" for size, top_k, blocks in moba_settings(outcomes)]
    return "; ".join(settings) or "full attention alone"


def _layers(stage: Stage, size: str, runs: list[Outcome], study: Path) -> Chart:
    full, moba = of_kind(runs, FULL), of_kind(runs, MOBA)
    noise = seed_noise(runs, "trailing")

    def level(own: list[Outcome], reference: list[Outcome]) -> Level:
        found = difference(own, reference, "trailing", noise) if reference else None
        if found is None:
            return Level(mean_loss(own, "trailing"))
        line = mean_loss(reference, "trailing")
        return Level(line + found.mean, found.interval and found.interval + line)

    hybrids = arms_of(runs, HYBRID)
    names, layers_name = _hybrid_names([own[0] for own in hybrids])
    named = dict(zip(names, hybrids, strict=True))
    shown, from_moba = ({name: level(own, line) for name, own in named.items()} for line in (full, moba))
    between = level(moba, full) if moba else None
    figure = figures.layers_chart(
        shown,
        mean_loss(full, "trailing") if full else None,
        between,
        from_moba,
        title=f"Layer-wise hybrid, {_model(runs[0])}, {describe_sparsity(runs)}",
        layers_name=layers_name,
        loss_name=f"Trailing LM loss (nats)\n{describe_trailing(runs[0])}",
    )
    caption = f"Trailing loss over the layers with full attention ({size_name(runs[0])}; {behind(runs, 'trailing')})."
    if any(found and found.interval for found in (*shown.values(), *from_moba.values(), between)):
        caption += (
            f" Bars: {LEVEL:.0%} interval of the difference from the line of the bar's colour, on the same windows: a "
            "bar that does not reach that line is resolved from it."
        )
    if not all(share_a_seed(own, line) for own in hybrids for line in (full, moba) if line):
        caption += " Without a bar: of other seeds, not compared."
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-{size}-layerwise-hybrid"), caption)


def _hybrid_names(hybrids: Sequence[Outcome]) -> tuple[list[str], str]:
    """Name the hybrids on the chart, all differently, and the axis: counts of last layers, or the arms."""
    layers = hybrids[0].layers
    counts = [len(run.full_layers) for run in hybrids]
    if all(run.ends_full for run in hybrids) and len(set(counts)) == len(counts):
        of = f" of {layers}" if layers else ""
        names = [f"{count} layer{'s' * (count != 1)}" for count in counts]
        return names, f"Number of full-attention layers (the last{of})"
    return [run.label for run in hybrids], "Arm, by its number of full-attention layers"


def _scalings(stage: Stage, runs: list[Outcome], study: Path, axis: str) -> list[Chart]:
    """Draw the scaling chart by every convention."""
    names = {**SCALING, axis: ""}
    return [
        _scaling(stage, runs, study, shown, f"{stage.name}-scaling-law{names[shown]}")
        for shown in law_axes(stage, runs, axis)
    ]


def _scaling(stage: Stage, all_runs: list[Outcome], study: Path, axis: str, name: str) -> Chart:
    """Draw the scaling chart of the runs whose seeds all arms have, with laws of the sizes that all arms have."""
    runs, shared = of_same_seeds(all_runs), comparable(all_runs)
    fitted = by("arm", shared)
    arms, full = by("arm", runs).values(), of_kind(runs, FULL)
    laws = {own[0].label: fit(own, "trailing", axis) for own in fitted.values()}
    line = fitted.get(full[0].run.arm, []) if full else []
    others = [own for own in fitted.values() if line and own != line]
    pairs = {own[0].label: fit_pair(own, line, "trailing", axis) for own in others}
    names = {size: size_name((of_kind(own, FULL) or own)[0]) for size, own in by("size", runs).items()}
    figure = figures.scaling_chart(
        [_curve(seeds, axis, names[size]) for own in arms for size, seeds in by("size", own).items()],
        {arm: law for arm, law in laws.items() if law},
        {arm: pair for arm, pair in pairs.items() if pair},
        arm_looks(runs),
        fitted={names[run.run.size] for run in shared},
        reference=full[0].label if full else "",
        title=f"Scaling laws, {describe_trailing(runs[0])}",
        loss_name="Trailing LM loss (nats)",
        axis=replace(AXES[axis], caption=FASTEST) if axis == SECONDS and runs[0].rate else AXES[axis],
    )
    parts = [
        _ends(runs, axis, any(laws.values())),
        _bands() if any(pairs.values()) else "",
        _unfitted(names, {run.run.size for run in shared}) if any(laws.values()) else "",
        "Left out: seeds that not every arm of a size has." if len(runs) < len(all_runs) else "",
        _measured(runs) if axis == SECONDS else "",
    ]
    return Chart(stage, save(figure, study / FOLDER / name), " ".join(part for part in parts if part))


def _ends(runs: Sequence[Outcome], axis: str, laws: bool) -> str:
    """Say what a scaling chart's lines are."""
    caption = (
        f"Trailing loss over {_over(axis)}: along the runs of each size, named by its parameters "
        "without embeddings (solid, mean of seeds)"
    )
    counts = behind(runs, "trailing")
    if laws:
        return f"{caption}, and the fitted laws through their ends (dashed; {counts})."
    return (
        f"{caption} ({counts}). There is no law yet: it takes two windows, and {LEAST_SIZES} sizes that the arms share."
    )


def _bands() -> str:
    """Say what the bands around laws are."""
    return (
        f"Bands: pointwise {LEVEL:.0%} interval of a law's difference from that of full attention, over runs, "
        "documents and windows, where both laws are drawn: a band that does not touch the red line is resolved "
        "from it. Bands of few sizes are wide: runs are drawn anew, too."
    )


def _unfitted(names: Mapping[str, str], fitted: set[str]) -> str:
    """Name the sizes that no law is fitted through."""
    left_out = ", ".join(name for size, name in names.items() if size not in fitted)
    return left_out and f"Laws are of the sizes that all arms with a law have, and so without {left_out}."


def _measured(runs: Sequence[Outcome]) -> str:
    """Say what accelerator seconds were measured of."""
    if runs[0].rate:
        return f"Of a size's arms at the fastest micro-batch of each ({RATES_FILE}). {_dense(runs[0])}"
    windows = sorted({run.config.train.batch_size for run in runs})
    counts = " and ".join(counted(n, "window") for n in windows)
    return f"Measured while training, with {counts} a step. {_dense(runs[0])}"


def _over(axis: str) -> str:
    """Say in words what a scaling chart is drawn over."""
    return "accelerator seconds" if axis == SECONDS else f"compute by {AXES[axis].head}"


def _dense(run: Outcome) -> str:
    """Say what full attention runs on, for a chart that shows speed: cuDNN's kernels are asked for first, on GPUs."""
    return "Full attention is SDPA/cuDNN." if run.result["hardware"]["gpus"] else "Full attention is SDPA."


def _positions(stage: Stage, outcomes: list[Outcome], study: Path) -> Chart:
    """Draw the loss by position of the largest size's arms, and their differences from full attention."""
    runs = largest(outcomes)
    arms = by("arm", runs)
    reference = of_kind(runs, FULL) or next(iter(arms.values()))
    shown = _most_telling(arms, reference)
    ranges, same = range(len(reference[0].ranges)), by("arm", of_same_seeds(runs))
    differences = {
        own[0].label: [_level(difference(own, reference, k, seed_noise(runs, k))) for k in ranges]
        for own in shown
        if own != reference and share_a_seed(own, reference)
    }
    name = inside(reference[0].label)
    figure = panels.position_chart(
        reference[0].ranges,
        {own[0].label: [mean_loss(same[own[0].run.arm], k) for k in ranges] for own in shown},
        differences,
        arm_looks(runs),
        title=f"Loss by position, {_model(runs[0])}, length {runs[0].config.data.length:,}",
        loss_name="LM loss (nats)",
        difference_name=f"Difference from\n{name} (nats)",
    )
    caption = f"Loss by position ({size_name(runs[0])}), and the difference from {name} ({behind(runs, 0)})."
    if any(level.interval for levels in differences.values() for level in levels):
        caption = f"{caption} Bars: {LEVEL:.0%} interval, on the same windows."
    if len(shown) < len(arms):
        caption += f" Of {len(arms)} arms the reference, MoBA and those with the lowest last range are shown."
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
    sizes = by_parameters([outcome for outcome in outcomes if outcome.ranges == ranges])
    names = {size: _model(own[0]) for size, own in sizes.items()}
    if len(set(names.values())) < len(names):
        names = {size: f"{size}, {name}" for size, name in names.items()}
    looks = size_looks(outcomes)
    span = f"{ranges[0][0]:,}-{ranges[0][1]:,}"
    figure = panels.position_chart(
        ranges,
        {names[size]: [mean_loss(own, k) for k in range(len(ranges))] for size, own in sizes.items()},
        {names[size]: [_level(gain(own, k, 0)) for k in range(len(ranges))] for size, own in sizes.items()},
        {names[size]: looks[size] for size in sizes},
        title=f"Loss by position, {inside(outcomes[0].label)}, length {outcomes[0].config.data.length:,}",
        loss_name="LM loss (nats)",
        difference_name=f"Difference from\npositions {span} (nats)",
    )
    counts = "; ".join(f"{names[size]}: {behind(own, 0)}" for size, own in sizes.items())
    caption = (
        f"Loss by position of {inside(outcomes[0].label)}, and its difference from that at the positions {span} of "
        f"the same windows, with {LEVEL:.0%} intervals ({counts}). Below zero: what a longer context is good for."
    )
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-positions"), caption)


def _contexts(stage: Stage, outcomes: list[Outcome], study: Path) -> Chart:
    """Draw the trailing loss over the tokens in sight, of the largest size's arms, or every size of one arm."""
    key = "size" if len(by("arm", outcomes)) == 1 else "arm"
    runs = outcomes if key == "size" else largest(outcomes)
    first = runs[0]
    runs = [run for run in runs if run.contexts == first.contexts]
    groups, same = by(key, runs), by(key, of_same_seeds(runs))
    if key == "arm":
        shown = _most_telling(groups, of_kind(runs, FULL) or next(iter(groups.values())))
        groups = {own[0].label: own for own in shown}
    cuts = [Cut(context) for context in first.contexts]
    seen: list[Cut | Named] = [*cuts, "trailing"]
    figure = panels.context_chart(
        [*first.contexts, first.config.data.length],
        {name: [mean_loss(same[getattr(own[0].run, key)], cut) for cut in seen] for name, own in groups.items()},
        {name: [_level(gain(own, cut, "trailing")) for cut in cuts] for name, own in groups.items()},
        size_looks(runs) if key == "size" else arm_looks(runs),
        title=f"Use of context, {inside(first.label) if key == 'size' else _model(first)}",
        loss_name=f"Loss of the last\n{first.config.trailing:,} tokens (nats)",
        difference_name="Lost for want of\nmore context (nats)",
    )
    caption = (
        f"Loss of the last {first.config.trailing:,} tokens of the same windows over the tokens in sight, and what is "
        f"lost against all {first.config.data.length:,}, with {LEVEL:.0%} intervals ({behind(runs, 'trailing')}). "
        "A bar above zero: what lies farther back helps; below zero: it does harm."
    )
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-contexts"), caption)


def _candidates(stage: Stage, size: str, runs: list[Outcome], found: Sequence[Standing], study: Path) -> Chart:
    noise = seed_noise(runs, "trailing")
    full = of_kind(runs, FULL)
    base = mean_loss(full, "trailing")
    smallest = 0.0 if noise is None else 100 * noise.smallest_difference(1) / base
    seeds = [len(own) for own in by("arm", runs).values() if len(own) > 1]
    figure = panels.candidates_chart(
        [standing.candidate for standing in found],
        arm_looks(runs),
        None if noise is None else (smallest, f"{counted(sum(seeds), 'run')} of {counted(len(seeds), 'arm')}"),
        title=f"Candidates, {_model(runs[0])}, {describe_trailing(runs[0])}",
        reference=full[0].label,
        difference_name=f"Loss against {inside(full[0].label)}, on the same windows",
    )
    speed = ", and training speed" if any(standing.speedup for standing in found) else ""
    caption = (
        f"Every candidate's loss against {inside(full[0].label)} ({size_name(runs[0])}; {behind(runs, 'trailing')}). "
        f"Bars: {LEVEL:.0%} interval of the paired difference. To the right: keys read over all layers, of those that "
        f"full attention reads{speed}.{speed and f' {_dense(runs[0])}'}"
    )
    if any(standing.own for standing in found):
        caption += " Diamonds: against full attention with the same key convolution."
    if noise is not None:
        caption += (
            f" Grey: below {smallest:.2f}%, where two single seeds cannot be told apart; the noise is that of "
            f"{counted(len(seeds), 'arm')} with {sum(seeds)} seeds in all, which leave "
            f"{counted(noise.freedom, 'degree')} of freedom."
        )
    return Chart(stage, save(figure, study / FOLDER / f"{stage.name}-{size}-candidates"), caption)


def _level(found: Difference | None) -> Level:
    assert found is not None, "position ranges have losses"
    return Level(found.mean, found.interval)


def _curve(seeds: Sequence[Outcome], axis: str, name: str) -> Curve:
    """Return the course of the runs of one arm and size, their mean over seeds, under the size's name."""
    compute = np.mean([[AXES[axis].value(row) for row in run.evals] for run in seeds], axis=0)
    loss = np.mean([[row["trailing_loss"] for row in run.evals] for run in seeds], axis=0)
    begun = compute > 0
    return Curve(seeds[0].label, name, compute[begun].tolist(), loss[begun].tolist())


def _model(run: Outcome) -> str:
    return f"{size_name(run)} parameters"
