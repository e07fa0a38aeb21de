"""Has accelerate take CPU processes for GPUs, so that its mesh and FSDP2 run over gloo; it refuses them otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from openmoba.lab.train import arguments


@contextmanager
def as_gpus() -> Iterator[None]:
    """Have what is made in here be so; the process group is there already."""
    with (
        patch.dict("os.environ", ACCELERATE_TORCH_DEVICE="cpu"),
        patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
    ):
        yield


@contextmanager
def laboratory_as_gpus() -> Iterator[None]:
    """Have the laboratory train so too."""

    def on_cpu(**given: Any) -> TrainingArguments:
        return TrainingArguments(
            **given | {"use_cpu": True, "dataloader_pin_memory": False, "accelerator_config": None}
        )

    gpus = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True), device=torch.device)
    with as_gpus(), patch.object(arguments, "TrainingArguments", on_cpu), patch.object(arguments, "torch", gpus):
        yield
