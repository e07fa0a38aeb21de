"""What a run will be, before it is one: its model, the operations and the memory it takes, and about how long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from openmoba.config import MobaConfig
from openmoba.hf.support import key_value_heads
from openmoba.lab.config import ModelConfig, RunConfig, stored_config
from openmoba.lab.measure.compute import AXES, PFLOPS_DAY, PFLOPS_DAYS, Shape, training_compute
from openmoba.lab.model.build import build_model, model_like, set_attention
from openmoba.lab.model.loss import LOGITS_PER_CHUNK
from openmoba.lab.model.overrides import feed_forward_entry
from openmoba.lab.run_files import is_run

Device = Literal["cpu", "cuda"]
_Overrides = tuple[tuple[str, bool | int | float | str | None], ...]
SHARE: dict[Device, float] = {"cpu": 0.3, "cuda": 0.55}
"""Of the rate of large matrix products, what a run's work is done at: 0.2 to 0.5 on two cores. With `ELEMENTWISE` it
foretells the steps of 2 M to 32 M parameters in results/h200 within 25 %; those of 545 M come out half too long."""
ELEMENTWISE: dict[Device, float] = {"cpu": 6 * 60_000, "cuda": 28_000}
"""Work, in operations per layer and token (on GPUs, and channel), of what is no product, such as norms."""
HEAD_NORMS = 10_800
"""That of norms of queries and keys, on GPUs, a layer, token and channel of these; results/h200 has qwen3 and llama."""


@dataclass(frozen=True)
class Plan:
    """A run's model, compute in PFLOP/s-days by convention, operations, and bytes of one device.

    Attributes:
        work: operations by which time is estimated, see `planned_work`.
        activations: the part of `memory` that is kept from the forward pass for the backward pass.
    """

    shape: Shape
    compute: dict[str, float]
    work: float
    memory: float
    activations: float


def plan_of(config: RunConfig, device: Device | None = None) -> Plan:
    """Plan a run, with a tokenizer of `data.vocab_size` entries, trained on one device.

    Args:
        device: None for this machine's.
    """
    shape, train, device = planned_shape(config), config.train, device or this_device()
    compute = training_compute(shape, config.arm, train.steps, train.steps, train.batch_size, 0.0)
    compute = {name: value for name, value in compute.items() if AXES[name].unit == PFLOPS_DAYS}
    activations = activation_bytes(config, device)
    # Weights, gradients and two moments in fp32; a chunk of logits, its softmax and that in the weights' precision.
    chunk = min(shape.vocab * config.data.length, LOGITS_PER_CHUNK[device])
    memory = 16 * shape.total + activations + 10 * chunk
    return Plan(shape, compute, planned_work(config, device), memory, activations)


def planned_shape(config: RunConfig) -> Shape:
    """Return the shape of the model that the run will have with a tokenizer of `data.vocab_size` entries."""
    return Shape.of(planned_model(config), config.data.length)


def planned_model(config: RunConfig) -> Any:
    """Return that model, without memory for its weights; of a model to start from, read what it is.

    Raises:
        ValueError: there is no such model.
    """
    start, model, attention = config.train.start_from, config.model, config.arm.sparsest(config.train.steps)
    overrides = model.overrides
    if start is not None and not is_run(start):
        return _model_from(start, tuple(overrides.items()), attention)
    if start is not None:
        overrides = stored_config(start).model.overrides | overrides
    entries = tuple(overrides.items())
    return _model(model.family, model.size, entries, config.data.vocab_size, config.data.length, attention)


def planned_work(config: RunConfig, device: Device | None = None) -> float:
    """Count the operations of a run, by which its time is estimated and the time left of a study is told.

    Counted are training and evaluation, causal-exact, and an allowance for what is no product, see `ELEMENTWISE`. The
    time is that at `SHARE` of the device's rate.
    """
    shape, train, device = planned_shape(config), config.train, device or this_device()
    compute = training_compute(shape, config.arm, train.steps, train.steps, train.batch_size, 0.0)
    elementwise = ELEMENTWISE["cpu"]
    if device == "cuda":
        elementwise = shape.hidden * ELEMENTWISE["cuda"] + _normed_channels(planned_model(config), shape) * HEAD_NORMS
    operations = compute["causal_exact"] * PFLOPS_DAY + config.tokens * shape.layers * elementwise
    evaluated = len(config.evaluation_steps) * config.eval.windows * config.data.length
    evaluated += config.eval.windows * sum(config.eval.contexts)
    return operations * (1 + evaluated / config.tokens / 3)  # a forward pass is a third of a step


def activation_bytes(config: RunConfig, device: Device | None = None) -> float:
    """Count the bytes that eager layers keep from the forward to the backward pass of one micro-batch.

    Per token and layer of width C, with p bytes in products (2 in bf16, 4 in fp32): the hidden state before and after
    each norm in fp32 and once more as the input of a product, queries, keys, values, the attention's output twice, and
    four tensors of the feed-forward width. Compiled layers keep less, gradient checkpointing the hidden states alone.
    """
    model, shape, train = planned_model(config), planned_shape(config), config.train
    entries = model.config
    bf16 = in_bf16(config, device)
    product, width = 2 if bf16 else 4, shape.hidden
    heads = shape.heads * shape.head_dim
    shared = _key_channels(model, shape)
    named = feed_forward_entry(entries)
    feed_forward = (getattr(entries, named) if named else None) or 4 * width
    layer: int = 20 * width + product * (3 * heads + 2 * shared + 4 * feed_forward)
    layer += 2 * product * width if bf16 else 0
    layer += (4 + product) * _normed_channels(model, shape)
    together = 1 if train.gradient_checkpointing else shape.layers
    layers = 4 * width * (shape.layers - together) + layer * together
    tokens = config.data.length * (train.micro_batch_size or train.batch_size)
    weights = 2 * shape.non_embedding * together / shape.layers if bf16 else 0  # autocast's copies
    return tokens * (layers + 24 * width) + weights


def _normed_channels(model: Any, shape: Shape) -> int:
    """Return the channels of queries and keys that have norms of their own."""
    normed = "qwen3" in model.config.model_type
    return shape.heads * shape.head_dim + _key_channels(model, shape) if normed else 0


def _key_channels(model: Any, shape: Shape) -> int:
    return key_value_heads(model.config) * shape.head_dim


def in_bf16(config: RunConfig, device: Device | None = None) -> bool:
    """Say whether the run's products are in bf16, on this machine or such a device."""
    precision = config.train.precision
    return precision == "bf16" or (precision == "auto" and (device or this_device()) == "cuda")


def matrix_rate(bf16: bool) -> float:
    """Measure in a moment the operations per second of a large matrix product on this machine's device."""
    device = this_device()
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for it
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def this_device() -> Device:
    """Return what this machine trains on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=64)
def _model_from(source: str, overrides: _Overrides, attention: MobaConfig | None) -> Any:
    with torch.device("meta"):
        model = model_like(source, dict(overrides))
        set_attention(model, attention)
    return model


@lru_cache(maxsize=64)
def _model(
    family: str,
    size: str,
    overrides: _Overrides,
    vocab_size: int,
    length: int,
    attention: MobaConfig | None,
) -> Any:
    with torch.device("meta"):
        model = build_model(ModelConfig(family, size, dict(overrides)), vocab_size, length, 0)
        set_attention(model, attention)
    return model
