"""Which processes share a sequence where accelerate makes no mesh, and that they are given the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed
from torch.distributed.device_mesh import init_device_mesh


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

    They do so under a mesh with the dimension "cp". The mesh is the whole process's, so it is taken back; None leaves
    accelerate's own.
    """
    state = accelerator.state
    before = state.device_mesh
    if mesh is not None:
        state.device_mesh = mesh
    try:
        yield
    finally:
        state.device_mesh = before
