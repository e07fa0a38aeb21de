"""What a run will be, before it is one: its model, and the operations it takes."""

from __future__ import annotations

from functools import lru_cache

import torch

from openmoba.lab.compute import PFLOPS_DAY, Shape, training_compute
from openmoba.lab.config import ModelConfig, RunConfig
from openmoba.lab.model import build_model


def planned_shape(config: RunConfig) -> Shape:
    """The shape of the model that the run will have with a tokenizer of `data.vocab_size` entries.

    Of a model from elsewhere (`train.start_from`) this is a guess: that of `model.size`.
    """
    model = config.model
    overrides = () if config.train.start_from else tuple(model.overrides.items())
    return _shape(model.family, model.size, overrides, config.data.vocab_size, config.data.length)


def planned_work(config: RunConfig) -> float:
    """Operations of a run, by which the time left of a study is told.

    Counted are training and evaluation, causal-exact, and an allowance per layer and token for what does not shrink
    with the width (norms, kernel launches).
    """
    shape, train = planned_shape(config), config.train
    compute = training_compute(shape, config.arm, train.steps, train.steps, train.batch_size, 0.0)
    operations = compute["causal_exact"] * PFLOPS_DAY + config.tokens * shape.layers * 6 * 60_000
    evaluated = len(config.evaluation_steps) * config.eval.windows * config.data.length
    return operations * (1 + evaluated / config.tokens / 3)  # a forward pass is a third of a step


@lru_cache(maxsize=64)
def _shape(family: str, size: str, overrides: tuple[tuple[str, bool | int | float | str | None], ...],
           vocab_size: int, length: int) -> Shape:  # fmt: skip
    with torch.device("meta"):
        return Shape.of(build_model(ModelConfig(family, size, dict(overrides)), vocab_size, length, 0), length)
