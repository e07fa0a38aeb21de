"""The learning rate of each step, and which runs may become longer without one of their steps becoming another."""

from __future__ import annotations

import math

from openmoba.lab.config import RunConfig, TrainConfig, changes

_MAY_CHANGE = (
    "train.steps",
    "train.warmup",
    "train.decay",
    "train.final_learning_rate",
    "arm.switch_at",
    "arm.warm_start",
    "eval.every",
    "eval.count",
)
"""Settings that say when something happens, as a share of the steps or by their number."""


def learning_rate_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`, as a share of the peak."""
    warmup = round(train.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    decay = (1 - train.warmup if train.schedule == "cosine" else train.decay) * steps
    passed = max(0.0, step - (steps - decay)) / max(decay, 1)
    shape = (1 + math.cos(math.pi * passed)) / 2 if train.schedule == "cosine" else 1 - passed
    return train.final_learning_rate + (1 - train.final_learning_rate) * shape


def check_lengthening(stored: RunConfig, wanted: RunConfig, done: int) -> None:
    """Raise ValueError unless the first `done` steps of the run `stored` are those of the longer run `wanted`, too.

    Only settings that say when something happens may change, and nothing may have happened at another time.
    """
    changed = changes(stored, wanted)
    said = "; ".join(change for change in changed if not change.startswith(_MAY_CHANGE))
    if said or wanted.train.steps <= stored.train.steps:
        raise ValueError(said or "; ".join(changed))
    said, before, after = "; ".join(changed), stored.train, wanted.train
    for step in range(done + 1 if done else 0):  # the rate of the next step is in the checkpoint
        rates = [learning_rate_factor(step, train.steps, train) * train.learning_rate for train in (before, after)]
        if not math.isclose(*rates, rel_tol=1e-9):
            raise ValueError(
                f"{said}, so the learning rate of step {step + 1} would have been {rates[1]:.4g} and was "
                f"{rates[0]:.4g}. A run can be lengthened before its train.schedule=wsd decays, with train.warmup="
                f"{before.warmup * before.steps / after.steps:.4g} for as many steps of warm-up; or start a new one "
                "with train.start_from"
            )
    trained = [
        range(steps.start, min(done, steps.stop))
        for steps in (stored.arm.moba_steps(before.steps), wanted.arm.moba_steps(after.steps))
    ]
    if trained[0] != trained[1]:
        raise ValueError(
            f"{said}, so the attention would have been switched at another step; give the shares that say the same, "
            f"arm.switch_at={stored.arm.switch_step(before.steps) / after.steps:.4g} "
            f"arm.warm_start={stored.arm.warm_start * before.steps / after.steps:.4g}"
        )
    unmeasured = {step for step in wanted.evaluation_steps if step <= done} - {*stored.evaluation_steps}
    if unmeasured:
        raise ValueError(
            f"{said}, so step {min(unmeasured)}, which is done, would have been evaluated; give eval.every"
        )
