"""What a run says before its first step, and instead of it: what is trained, on what, how, and where its records go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from openmoba.hf.support import key_value_heads
from openmoba.lab.arms import FULL
from openmoba.lab.columns import gigabytes, short
from openmoba.lab.config import RunConfig
from openmoba.lab.measure.compute import Shape
from openmoba.lab.progress import duration
from openmoba.lab.run_files import METRICS_FILE
from openmoba.lab.train.plan import SHARE, in_bf16, matrix_rate, plan_of, this_device
from openmoba.ops.explain import explain
from openmoba.records.provenance import device_name

if TYPE_CHECKING:
    from openmoba.lab.train.trainer import RunTrainer


def summary_of(trainer: RunTrainer) -> str:
    """Write the summary, several lines."""
    config, folder, data, args = trainer.config, trainer.folder, trainer.data, trainer.args
    train, tokens = config.train, config.train.batch_size * config.data.length
    epochs = train.steps * train.batch_size / len(data.train)
    devices = f"{args.world_size} x {device_name(args.device)}" if args.world_size > 1 else device_name(args.device)
    if trainer.sharding is not None:
        devices += f", a window over {trainer.sharding.ranks} of them, by {trainer.sharding.way}"
    evaluations = len(config.evaluation_steps)
    rows = {
        "model": f"{config.model_words}, {parameters(trainer.shape)}",
        "attention": _attention_path(trainer),
        "data": f"{config.data.source}: {len(data.train):,} windows of {config.data.length:,} tokens, "
        f"{len(data.valid):,} held out, vocabulary {len(data.tokenizer):,}",
        "training": f"{train.steps:,} steps of {tokens:,} tokens in {train.batch_size} windows: "
        f"{config.tokens:,} tokens, {epochs:.2g} epochs",
        "device": f"{devices}, {'bf16' if args.bf16 else 'fp32'}",
        "records": f"{folder / METRICS_FILE} every {train.log_every} steps, {evaluations} "
        f"evaluation{'s' if evaluations > 1 else ''}, checkpoint every {train.checkpoint_every}",
    }
    return f"{folder}\n{_described(rows)}"


def plan_text(config: RunConfig) -> str:
    """Say what a dry run does: parameters, tokens, compute by convention, about how much memory and time."""
    plan, train, evaluations = plan_of(config), config.train, len(config.evaluation_steps)
    rate, share = matrix_rate(in_bf16(config)), SHARE[this_device()]
    compute = ", ".join(f"{name} {value:.3g}" for name, value in plan.compute.items())
    rows = {
        "model": f"{config.model_words}, {parameters(plan.shape)}, vocabulary {plan.shape.vocab:,}",
        "attention": _attention(config, plan.shape),
        "training": f"{train.steps:,} steps of {train.batch_size:,} windows of {config.data.length:,} tokens: "
        f"{config.tokens:,} tokens; {config.eval.windows:,} windows evaluated {evaluations:,} "
        f"time{'s' if evaluations > 1 else ''}",
        "compute": f"{compute} PFLOP/s-days",
        "memory": f"about {gigabytes(plan.memory)} on one device, {gigabytes(plan.activations)} of it activations of "
        "eager layers",
        "time": f"about {duration(plan.work / (share * rate))} on this machine, if training reaches {share:.0%} of the "
        f"{rate / 1e12:.3g} TFLOP/s that matrices reach here",
    }
    return _described(rows)


def _described(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<10} {text}" for name, text in rows.items())


def parameters(shape: Shape) -> str:
    """Write a model's parameters in words."""
    return f"{short(shape.total)} parameters ({short(shape.non_embedding)} without embeddings)"


def _attention(config: RunConfig, shape: Shape) -> str:
    """Say what the run's layers attend with, and the share of the keys that they read: 100% is full attention."""
    arm, steps = config.arm, config.train.steps
    said = arm.describe(shape.layers, steps)
    if arm.kind is FULL:
        return said
    return f"{said}: {arm.key_share(shape.layers, config.data.length, steps):.0%} of full attention's keys"


def _attention_path(trainer: RunTrainer) -> str:
    """Say what the run's layers attend with, and which implementation of MoBA runs, as `openmoba.explain` does."""
    arm, steps, shape = trainer.config.arm, trainer.config.train.steps, trainer.shape
    attention, said = arm.sparsest(steps), _attention(trainer.config, shape)
    if attention is None or arm.kind is FULL:
        return said
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    shared = key_value_heads(trainer.model.config)
    q, k, v = (
        torch.empty(1, shape.length, heads, shape.head_dim, dtype=dtype, device=trainer.args.device)
        for heads in (shape.heads, shared, shared)
    )
    found = explain(q, k, v, block_size=attention.block_size, top_k=attention.top_k)
    return f"{said}; {found.impl} ({found.reason})"
