"""`transformers.Trainer` whose micro-batches are launched as CUDA graphs, for small models on a GPU.

    class MyTrainer(GraphedSteps, Trainer): ...

It is for one process, rows of one length without padding or packing, and bf16 or fp32. Compile the layers before,
which gains as much. The first step captures the graph; where that cannot be it raises `CaptureError`, a ValueError.
Batches of another shape, such as an epoch's last, run without it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from openmoba.hf.step_graph import CaptureError, StepGraph


class GraphedSteps:
    """A mixin, to be named before `Trainer` or a class of it."""

    _step_graph: StepGraph | None = None

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch as Trainer does, in one launch."""
        trainer: Any = self
        model.train()
        batch = {
            **trainer._prepare_inputs(inputs),
            "num_items_in_batch": num_items_in_batch,
            # A constant of the graph: a step with fewer is of another kind.
            "micro_batches": trainer.current_gradient_accumulation_steps,
        }
        if self._step_graph is None:
            if trainer.args.fp16:
                raise CaptureError("fp16 scales the loss by what came before; use bf16=True")
            self._step_graph = StepGraph(model, batch, partial(self._loss_of, model))
        return self._step_graph(batch)

    def _loss_of(self, model: Any, num_items_in_batch: Any, micro_batches: int, **inputs: Any) -> Tensor:
        """Return a micro-batch's share of the step's loss, by Trainer's rule."""
        trainer: Any = self
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        shared = trainer.compute_loss_func is None and (
            not trainer.model_accepts_loss_kwargs or num_items_in_batch is None
        )
        return loss / micro_batches if shared else loss
