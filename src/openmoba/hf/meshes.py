"""Processes that share a sequence: their mesh where accelerate makes none, their batches, and the name of their CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers.trainer_utils import has_length, seed_worker

from openmoba.parallel.alike import different


def sequence_mesh(ranks: int, device: str) -> Any:
    """Make the mesh of all processes of which `ranks` neighbours share a sequence, dimensions "dp_shard" and "cp".

    Raises:
        ValueError: no process group, or `ranks` does not divide the processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"sharing a sequence among {ranks} processes needs a process group; start the program with "
            f"torchrun --nproc-per-node {ranks}"
        )
    processes = distributed.get_world_size()
    if processes % ranks:
        raise ValueError(
            f"{ranks} processes are to share a sequence, which do not divide the {processes} that there are; start a "
            f"multiple of {ranks}"
        )
    return init_device_mesh(device, (processes // ranks, ranks), mesh_dim_names=("dp_shard", "cp"))


@contextmanager
def same_batches(accelerator: Any, mesh: Any) -> Iterator[None]:
    """Have accelerate's loaders that are prepared in here give the processes of a sequence the same batch.

    They do so under a mesh with the dimension "cp", and where every process reads the data: a process that reads
    iterable data for the others deals out batches by their number alone. The mesh is the whole process's, so it is
    taken back; None leaves accelerate's own.
    """
    state, settings = accelerator.state, accelerator.dataloader_config
    before = state.device_mesh, settings.dispatch_batches
    if mesh is not None:
        state.device_mesh, settings.dispatch_batches = mesh, False
    try:
        yield
    finally:
        state.device_mesh, settings.dispatch_batches = before


def same_seeds(loader: Any, mesh: Any) -> Any:
    """Have workers of a loader of Trainer's draw the same random numbers in all processes of a sequence; return it."""
    init = loader.worker_init_fn
    if mesh is not None and isinstance(init, partial) and init.func is seed_worker:
        loader.base_dataloader.worker_init_fn = partial(init, rank=distributed.get_rank() // mesh["cp"].size())
    return loader


def as_many(loader: Any, group: Any) -> Any:
    """Return the loader of this process, of which the others of its sequence have as many batches.

    Args:
        group: the processes that share a sequence, None for none.

    Raises:
        ValueError: they have not, in all of them; otherwise one would wait for what the others no longer have.
    """
    batches = len(loader) if has_length(loader) else None
    if group is not None and different(torch.tensor([-1 if batches is None else batches]), group):
        raise ValueError(
            f"the {distributed.get_world_size(group)} processes that share a sequence were given data of different "
            f"lengths, this one {'of none that is known' if batches is None else f'of {batches:,} batches'}; give them "
            "the same"
        )
    return loader


def loadable_device(arguments: Any) -> None:
    """Have Trainer's CPU be called "cpu": several processes are given "cpu:0", onto which torch.load puts nothing.

    Args:
        arguments: `TrainingArguments` on CPU.
    """
    vars(arguments)["_setup_devices"] = torch.device("cpu")
