"""Whether a run's micro-batches are launched as CUDA graphs, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmoba.hf.step_graph import CaptureError, StepGraph, why_not
from openmoba.lab.config import RunConfig
from openmoba.lab.progress import Progress


def wanted(config: RunConfig, device: str) -> bool:
    """Tell whether the run wants its steps as graphs on a device of this type."""
    return config.train.compile == "auto" and device == "cuda"


def reason_against(config: RunConfig, model: Any, conversations: bool) -> str | None:
    """Say why the steps of a run, of this model, cannot be graphs, before that is tried; None if nothing is known."""
    if config.train.fsdp:
        return "train.fsdp gathers weights in the middle of it"
    if conversations:
        return "conversations have different numbers of labels"
    return why_not(model, {})


class StepGraphs:
    """The graph of a run's micro-batches, one for each attention, captured when the first of them comes.

    Attributes:
        on: whether there is to be one; off for good where none can be had, which is told.
        reason: why there is none although the run wants it.
    """

    def __init__(self, progress: Progress) -> None:
        self.on, self.reason = False, ""
        self._progress = progress
        self._graph: StepGraph | None = None

    def launch(self, model: Any, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the loss of a micro-batch, whose gradients are added; None where it has to run without a graph."""
        if not self.on:
            return None
        if self._graph is None:
            try:
                self._graph = StepGraph(model, batch, lambda **given: model(**given))
            except CaptureError as error:
                self.stop(str(error))
            except torch.OutOfMemoryError:
                self.stop("there is no memory for it")
        return None if self._graph is None else self._graph(batch)

    def forget(self) -> None:
        """Let go of the graph: the attention changes, or the run is over."""
        self._graph = None

    def stop(self, reason: str) -> None:
        """Go on without graphs."""
        self.on, self.reason, self._graph = False, reason, None
        self._progress.note(f"a step is launched kernel by kernel, not as a CUDA graph: {reason} (train.compile=auto)")
