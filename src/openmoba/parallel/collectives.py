"""The collectives of attention, as functions of tensors.

They are torch's functional collectives, which name their group by a text and start without waiting, so that transfers
run beside computation. In torch 2.11 they have no gradients yet; what needs one is an operation of its own here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from openmoba.parallel.copies import contiguous

Waiting = Callable[[], Tensor]
"""Waits for a transfer that is under way, and returns what arrived."""


def prioritize_transfers() -> None:
    """Have NCCL's transfers go before the computation beside them; call it before a process group is made.

    It sets the environment variable TORCH_NCCL_HIGH_PRIORITY, which groups read when they are made, to 1, unless it is
    set. In a stream of ordinary priority a transfer waits for the attention kernel that runs, and the next kernel for
    the transfer: both were to run beside each other.
    """
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")


def group_of(group: Any) -> tuple[str, int, int]:
    """Return name, own rank and number of ranks of a process group.

    Args:
        group: a `ProcessGroup`, a `DeviceMesh` of one dimension, or None for all processes.

    Raises:
        ValueError: no process group is there, or this process is not in it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "context parallelism needs a process group: start the program with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    group = distributed.group.WORLD if group is None else group
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the process group that it is to share a sequence with")
    return group.group_name, rank, distributed.get_world_size(group)


def leave_group() -> None:
    """Take down the process groups, together with the other processes; nothing where there are none.

    One of gloo's threads gives the tensors of a collective back some time after it, and asks for Python's lock to do
    so; it aborts a process whose interpreter ends meanwhile. A barrier waits for all that and leaves nothing behind.
    """
    if distributed.is_available() and distributed.is_initialized():
        on_gpus = "nccl" in distributed.get_backend()
        distributed.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)
        distributed.destroy_process_group()


def gather(x: Tensor, ranks: int, group_name: str) -> Waiting:
    """Start to put the `x` of all ranks behind each other along dimension 0."""
    started = torch.ops._c10d_functional.all_gather_into_tensor(x, ranks, group_name)
    return lambda: torch.ops._c10d_functional.wait_tensor(started)


def exchange(x: Tensor, ranks: int, group_name: str) -> Waiting:
    """Start to send the n-th part of `x` along dimension 0 to rank n; what arrives lies in the order of its senders."""
    coming = start(x, ranks, group_name)
    return lambda: wait(coming)


def start(x: Tensor, ranks: int, group_name: str) -> Tensor:
    """Start an `exchange` and return what is on its way: it is for `wait` alone. No gradient."""
    sizes = [x.shape[0] // ranks] * ranks
    coming: Tensor = torch.ops._c10d_functional.all_to_all_single(x, sizes, sizes, group_name)
    return coming


def wait(coming: Tensor) -> Tensor:
    """Wait for what is on its way, and return it. No gradient."""
    got: Tensor = torch.ops._c10d_functional.wait_tensor(coming)
    return got


def started(x: Tensor, ranks: int, group_name: str) -> Tensor:
    """Start an `exchange` with a gradient. What it returns is on its way: it is for `arrived` alone.

    An exchange is its own transpose, so in the backward pass `arrived` starts one, and `started` waits for it. Those of
    calls that were made one after another are under way together there too.
    """
    return _Started.apply(x, ranks, group_name)  # type: ignore[no-any-return, no-untyped-call]


def arrived(x: Tensor, ranks: int, group_name: str) -> Tensor:
    """Wait for what was `started`, and return it."""
    return _Arrived.apply(x, ranks, group_name)  # type: ignore[no-any-return, no-untyped-call]


class _Started(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group_name: str) -> Tensor:
        return start(contiguous(x), ranks, group_name)

    @staticmethod
    def backward(ctx: Any, coming: Tensor) -> tuple[Tensor, None, None]:
        return wait(coming), None, None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, ranks: int, group_name: str) -> Tensor:
        ctx.group = ranks, group_name
        return wait(coming)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return start(contiguous(gradient), *ctx.group), None, None


def sum_parts(x: Tensor, ranks: int, group_name: str) -> Waiting:
    """Start to sum over all ranks, of which rank n gets the n-th part along dimension 0.

    The parts travel as they are and are summed in fp32: as many bytes as a reduce-scatter, which would round to the
    dtype of `x` at every rank, and the same sum each time.
    """
    arriving = exchange(x, ranks, group_name)
    return lambda: arriving().view(ranks, -1, *x.shape[1:]).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
