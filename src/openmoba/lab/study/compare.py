"""How far runs lie from others: differences of losses with their intervals, and what stands behind a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from openmoba.lab.columns import counted
from openmoba.lab.measure.resample import Difference, Numbers, SeedNoise, paired_difference
from openmoba.lab.study.groups import by
from openmoba.lab.study.outcomes import Cut, Loss, Named, Outcome
from openmoba.records.disk import Row


def difference(
    first: Sequence[Outcome], second: Sequence[Outcome], kind: Loss, noise: SeedNoise | None = None
) -> Difference | None:
    """Return the loss of the first arm minus that of the second, over the seeds that both have.

    None without such a seed, or without windows that have this loss.

    Args:
        first, second: the runs of two arms of one stage and one size.
        noise: `seed_noise` of that stage and size, which the interval then holds.

    Raises:
        ValueError: the runs of a pair were not measured on the same windows.
    """
    own, other = ({run.run.seed: run for run in runs} for runs in (first, second))
    pairs = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
    if not pairs or not all(run.has(kind) for pair in pairs for run in pair):
        return None
    documents = common_documents([run for pair in pairs for run in pair], kind)
    firsts, seconds = zip(*((one.windows(kind), two.windows(kind)) for one, two in pairs), strict=True)
    return paired_difference(firsts, seconds, documents, noise)


def gain(outcomes: Sequence[Outcome], first_kind: Loss, second_kind: Loss) -> Difference:
    """Return one loss of an arm minus another of the same windows, such as a later position range minus an earlier."""
    documents = common_documents(outcomes, first_kind)
    first, second = ([outcome.windows(kind) for outcome in outcomes] for kind in (first_kind, second_kind))
    return paired_difference(first, second, documents)


def seed_noise(outcomes: Iterable[Outcome], kind: Loss) -> SeedNoise | None:
    """Return the noise of seeds, pooled over the arms that have several; None if none has.

    Args:
        outcomes: the runs of one stage and one size.
    """
    measured = [outcome for outcome in outcomes if outcome.has(kind)]
    arms = by("arm", measured).values()
    return SeedNoise.of([float(np.nanmean(outcome.windows(kind))) for outcome in own] for own in arms)


def mean_loss(outcomes: Sequence[Outcome], kind: Named | int | Cut) -> float:
    """Return the mean final loss of the runs."""
    return sum(outcome.loss(kind) for outcome in outcomes) / len(outcomes)


def paired_loss(reference: Sequence[Outcome], own: Sequence[Outcome], kind: Named | int | Cut) -> float:
    """Return the mean final loss of the reference's runs whose seeds `own` has too: what a difference is a part of."""
    seeds = {run.run.seed for run in own}
    return mean_loss([run for run in reference if run.run.seed in seeds], kind)


def common_documents(outcomes: Sequence[Outcome], kind: Loss) -> Numbers:
    """List the documents of the windows that all these runs were measured on, as far as records say."""
    known = [outcome for outcome in outcomes if "document" in outcome.final["windows"]] or outcomes
    documents = known[0].documents(kind)
    for other in outcomes:
        same = np.array_equal(other.documents(kind), documents) if other in known else True
        if not same or len(other.windows(kind)) != len(documents):
            raise ValueError(
                f"{known[0].run.name} and {other.run.name} were not measured on the same validation windows, so "
                "they cannot be compared; train one of them again with the other's data"
            )
    return documents


def behind(outcomes: Sequence[Outcome], kind: Loss, seeds: int | None = None) -> str:
    """Say how many documents, windows and seeds stand behind a number of these runs.

    Args:
        seeds: None counts those of each arm and size.
    """
    first = outcomes[0]
    counts = Counter((run.run.arm, run.run.size) for run in outcomes).values()
    fewest, most = (seeds, seeds) if seeds else (min(counts), max(counts))
    kind = "lm" if not isinstance(kind, str) and not first.has_positions else kind
    documents = first.documents(kind)[~np.isnan(first.windows(kind))]
    parts = [counted(len(set(documents.tolist())), "document"), counted(len(documents), "window")]
    parts.append(f"{fewest} to {most} seeds" if fewest < most else counted(most, "seed"))
    return ", ".join(parts if "document" in first.final["windows"] else parts[1:])


def speeds_apart(outcomes: Iterable[Outcome]) -> str | None:
    """Say what makes seconds and tokens per second of these runs unlike; None where they compare.

    Other commits, devices or launches do, and steps so short that the host's launches may be what is timed: of one
    window, on a GPU without CUDA graphs. Rates of arms at their fastest micro-batch compare.
    """
    runs = list(outcomes)
    if all(run.rate is not None for run in runs):
        return None
    devices = (", ".join(run.result["hardware"]["gpus"]) or run.result["hardware"]["cpu"] for run in runs)
    found = {
        "commits": [str(run.result["commit"])[:10] for run in runs],
        "devices": devices,
        "ways to run layers": [_launched(run.result) for run in runs],
    }
    differing = [(name, list(dict.fromkeys(values))) for name, values in found.items()]
    unlike = [f"{len(each)} {name} ({', '.join(each)})" for name, each in differing if len(each) > 1]
    if not unlike and any(map(_may_time_the_host, runs)):
        return "one window a step without CUDA graphs, where the host may be what is timed"
    return " and ".join(unlike) or None


def _may_time_the_host(run: Outcome) -> bool:
    train = run.config.train
    windows = train.micro_batch_size or train.batch_size
    return bool(run.result["hardware"]["gpus"]) and windows == 1 and not run.result.get("graphed")


def _launched(result: Row) -> str:
    """Say how the layers of a run were launched. The first records do not say; those runs were eager."""
    return ("compiled" if result.get("compiled") else "eager") + (" in CUDA graphs" if result.get("graphed") else "")
