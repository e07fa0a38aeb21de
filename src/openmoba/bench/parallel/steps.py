"""Training steps of windows that all devices share, as `openmoba train` makes them."""

from __future__ import annotations

from dataclasses import replace

import torch

from openmoba.bench.parallel.cases import ParallelCase
from openmoba.bench.training.cases import TrainingCase
from openmoba.bench.training.loops import TrainerLoop
from openmoba.lab.config import RunConfig


def shared_loop(case: ParallelCase, ranks: int, device: torch.device) -> TrainerLoop:
    """Make the loop: one window a step, activations computed again; over several GPUs the model is sharded too."""
    assert case.size is not None
    layers = "compiled" if device.type == "cuda" else "eager"
    inner = TrainingCase(
        case.size, 1, case.block_size, case.top_k, case.full_layers or 0, tokens=case.tokens, layers=layers,
        kind="trainer", checkpointing=True,
    )  # fmt: skip
    return _SharedLoop(inner, device, ranks)


class _SharedLoop(TrainerLoop):
    def __init__(self, case: TrainingCase, device: torch.device, ranks: int) -> None:
        super().__init__(case, device)
        self._ranks, self._sharded = ranks, device.type == "cuda" and ranks > 1

    def config(self) -> RunConfig:
        plain = super().config()
        train = replace(plain.train, context_parallel=self._ranks, fsdp=self._sharded)
        return replace(plain, train=train)
