"""What a dry run of a study says: its runs, what they are or would be, and about how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openmoba.lab.columns import aligned, gigabytes, short
from openmoba.lab.progress import duration
from openmoba.lab.run_files import RESULT_FILE
from openmoba.lab.study.recipe import PlannedRun, Recipe
from openmoba.lab.study.work import begins_with, finished, state
from openmoba.lab.train.plan import SHARE, in_bf16, matrix_rate, plan_of, this_device
from openmoba.records.disk import read_json


def overview(recipe: Recipe, study: Path, tflops: float | None = None) -> str:
    """Write a line per run: whether it is finished, has begun or is missing, and what it is; then their sum.

    Args:
        tflops: rate of large bf16 matrix products of the GPU to plan for, in 1e12 operations per second; None for this
            machine, or the speed of the finished runs.
    """
    runs = recipe.runs
    device = this_device() if tflops is None else "cuda"
    plans = {run.name: plan_of(run.alone(), device) for run in runs}
    rate, source = _rate(runs, study, {name: plan.work for name, plan in plans.items()}, tflops)
    rows = []
    for run in runs:
        plan, config = plans[run.name], run.config(study)
        compute = [f"{value:.3g}" for value in plan.compute.values()]
        parameters, tokens = short(plan.shape.non_embedding), short(config.tokens)
        sizes = [parameters, tokens, *compute, gigabytes(plan.memory), duration(plan.work / rate)]
        rows.append([f"{state(run, study):9} {run.name}{begins_with(run)}", *sizes])
    conventions = list(next(iter(plans.values())).compute)
    heads = ["run", "parameters", "tokens", *conventions, "memory", "time"]
    left = [run for run in runs if not finished(run, study)]
    totals = (sum(plan.compute[name] for plan in plans.values()) for name in conventions)
    compute_text = ", ".join(f"{name} {value:.3g}" for name, value in zip(conventions, totals, strict=True))
    return "\n".join(
        [
            aligned(heads, rows),
            f"{len(runs)} runs, {len(left)} to be finished in about "
            f"{duration(sum(plans[run.name].work for run in left) / rate)} of one process, {source}; compute in "
            f"PFLOP/s-days: {compute_text}; parameters without embeddings, memory with eager layers",
        ]
    )


def _rate(runs: Sequence[PlannedRun], study: Path, work: dict[str, float], tflops: float | None) -> tuple[float, str]:
    """Return the operations per second of the study's runs, and where that is from."""
    if tflops is not None:
        share = SHARE["cuda"]
        return share * tflops * 1e12, f"at {share:.0%} of {tflops:g} TFLOP/s"
    done = [run for run in runs if finished(run, study)]
    if done:
        seconds = sum(read_json(study / run.name / RESULT_FILE)["seconds"] for run in done)
        return sum(work[run.name] for run in done) / seconds, f"at the speed of the {len(done)} finished ones"
    rate, share = matrix_rate(in_bf16(runs[0].config(study))), SHARE[this_device()]
    return share * rate, f"at {share:.0%} of the {rate / 1e12:.3g} TFLOP/s that matrices reach here"
