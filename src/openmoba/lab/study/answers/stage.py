"""What a stage's runs answer to its question: in short, and each number with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from openmoba.lab.arms import FULL, MOBA
from openmoba.lab.study.answers.contexts import context_in_short, gained
from openmoba.lab.study.answers.laws import law_ratio, law_ratios, laws_in_short
from openmoba.lab.study.answers.layers import closing, layers_in_short
from openmoba.lab.study.answers.short_list import best_in_short, nearest
from openmoba.lab.study.compare import behind, difference, paired_loss, seed_noise
from openmoba.lab.study.groups import by, largest, of_kind, references
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.recipe import Stage
from openmoba.lab.study.words import in_percent, inside, nats, size_name, verdict


def in_short(stage: Stage, outcomes: Sequence[Outcome], axes: Sequence[str]) -> str:
    """Say the answer to a stage's question in short, without intervals; "" where there is none yet.

    Args:
        outcomes: those that the stage compares, as `of_stage` gives them.
        axes: conventions of compute by which laws are compared.
    """
    if any(run.run.sweep for run in outcomes):  # `sweep` says what there is to say
        return ""
    if len(stage.arms) == 1:
        return context_in_short(outcomes)
    if stage.chart == "scaling":
        return laws_in_short(outcomes, axes)
    runs = largest(outcomes)
    if stage.chart == "layers":
        return layers_in_short(runs)
    return best_in_short(runs) if stage.chart == "compare" else ""


def details(stage: Stage, outcomes: Sequence[Outcome], axes: Sequence[str]) -> list[str]:
    """Say what stands behind the answer of a stage, each number with its interval; arguments as of `in_short`."""
    if any(run.run.sweep for run in outcomes):
        return []
    sizes = by("size", outcomes).values()
    if len(by("arm", outcomes)) == 1:
        return [gained(own) for own in sizes if len(own[0].ranges) > 2]
    if stage.chart == "scaling":
        return [law_ratio(one, axis) for axis in axes for one in law_ratios(outcomes, axis)]
    if stage.chart == "positions":
        return [sentence for runs in sizes for sentence in from_full(stage, runs)]
    told = closing if stage.chart == "layers" else nearest
    return [sentence for runs in sizes for sentence in told(runs)]


def from_full(stage: Stage, runs: Sequence[Outcome]) -> Iterator[str]:
    """Say how far the stage's own arms are from full attention in trailing loss, and from MoBA."""
    moba = of_kind(runs, MOBA)
    noise = seed_noise(runs, "trailing")
    for own in by("arm", (run for run in runs if run.run.stage == stage)).values():
        full, parts = references(own, runs), []
        for other in (*full, moba) if own[0].config.arm.kind is not FULL else full:
            found = difference(own, other, "trailing", noise) if other and own != other else None
            if found is not None:
                base = paired_loss(other, own, "trailing")
                shown = f"{nats(found)} ({in_percent(found, base)})"
                parts.append(f"{shown} from {inside(other[0].label)}, {verdict(found)}")
        if parts:
            told = f"{'; '.join(parts)} ({behind(own, 'trailing')})"
            yield f"{size_name(own[0])}: the trailing loss of {own[0].label} is {told}."
