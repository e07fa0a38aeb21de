"""Trainer's settings for a run, and whether the processes at hand can share its work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from openmoba.hf.meshes import loadable_device
from openmoba.hf.releases import CHECKPOINTING
from openmoba.lab.config import RunConfig, TrainConfig
from openmoba.parallel import prioritize_transfers


def training_arguments(config: RunConfig, folder: Path) -> Any:
    """Make Trainer's settings for a run.

    Raises:
        ValueError: no GPU to shard over, or the batch cannot be shared evenly by the devices and micro-batches.
    """
    train = config.train
    cuda = torch.cuda.is_available()
    share, micro = shares(train)
    if train.context_parallel > 1:
        prioritize_transfers()  # before TrainingArguments makes the process group
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        max_grad_norm=train.clip,
        optim="adamw_torch_fused",
        seed=train.seed,
        use_cpu=not cuda,
        bf16=train.precision == "bf16" or (train.precision == "auto" and cuda),
        fsdp=train.fsdp or None,
        parallelism_config=_parallelism(train, cuda),
        ddp_find_unused_parameters=False,
        # The callback decides when; see RunCallback.
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to="tensorboard" if train.tensorboard else "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # Batches are copied to the device behind its back, which takes pinned memory.
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},
        **{CHECKPOINTING: train.gradient_checkpointing},
    )
    # Without torchrun one process trains on one device; Trainer would split each batch over all it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if not cuda:
        loadable_device(arguments)
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments


def shares(train: TrainConfig) -> tuple[int, int]:
    """Count the windows of a step that a device has, or that devices share, and those of its micro-batches.

    Raises:
        ValueError: the processes that torchrun started cannot share the work as the run says.
    """
    cuda = torch.cuda.is_available()
    if train.fsdp and not cuda:
        raise ValueError("train.fsdp needs GPUs, and none is available; leave it out")
    ranks, processes = train.context_parallel, process_count()
    if processes % ranks:
        raise ValueError(
            f"train.context_parallel={ranks} processes share a window, which do not divide the {processes} there are; "
            f"start a multiple of {ranks}, as torchrun --nproc-per-node {ranks} -m openmoba ... does"
        )
    if ranks > 1 and cuda and not train.fsdp:
        raise ValueError(f"train.context_parallel={ranks} needs FSDP2 on GPUs; add train.fsdp")
    devices = processes // ranks
    share, rest = divmod(train.batch_size, devices)
    micro = train.micro_batch_size or max(1, share)
    if rest or share % micro:
        fewer = f", or have train.context_parallel={processes} processes share each window" if devices > 1 else ""
        raise ValueError(
            f"train.batch_size={train.batch_size} does not divide into {devices} device(s) with "
            f"micro-batches of {micro}; change train.batch_size or train.micro_batch_size{fewer}"
        )
    return share, micro


def process_count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _parallelism(train: TrainConfig, cuda: bool) -> Any:
    """Return accelerate's settings of the mesh, None where it makes none."""
    if train.context_parallel == 1 or not cuda:
        return None
    from accelerate import ParallelismConfig

    beside = process_count() // train.context_parallel
    return ParallelismConfig(cp_size=train.context_parallel, dp_shard_size=beside)
