"""The collectives of attention. They start without waiting, so that transfers run beside computation.

None has a gradient but `started` and `arrived`, and these have no second one: what arrives knows no graph of another
process, so torch refuses to differentiate twice. Compilers do not trace them: who calls them is kept from compiling.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from openmoba.parallel.copies import contiguous, copy_into

if TYPE_CHECKING:  # builds of torch without distributed have none
    from torch.distributed import ProcessGroup, Work

Waiting = Callable[[], Tensor]
"""Waits for a transfer that is under way, and returns what arrived."""


def prioritize_transfers() -> None:
    """Have NCCL's transfers go before the computation beside them; call it before a process group is made.

    It sets the environment variable TORCH_NCCL_HIGH_PRIORITY, which groups read when they are made, to 1, unless it is
    set. In a stream of ordinary priority a transfer waits for the attention kernel that runs, and the next kernel for
    the transfer: both were to run beside each other.
    """
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")


def group_of(group: Any) -> tuple[ProcessGroup, int, int]:
    """Return a process group, the own rank and the number of ranks in it.

    Args:
        group: a `ProcessGroup`, a `DeviceMesh` of one dimension, or None for all processes.

    Raises:
        ValueError: no process group is there, this process is not in it, or it is none that a sequence can lie over.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "context parallelism needs a process group: start the program with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim > 1:
            names = group.mesh_dim_names
            raise ValueError(
                f"a sequence lies over one dimension of a mesh, and this one has {group.ndim}, "
                f"{', '.join(names) if names else 'without names'}; give one of them, such as mesh['cp']"
            )
        group = group.get_group()
    group = distributed.group.WORLD if group is None else group
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the process group that it is to share a sequence with")
    return group, rank, distributed.get_world_size(group)


def leave_group() -> None:
    """Take down the process groups, together with the other processes; nothing where there are none.

    Threads of gloo give the tensors of a collective back some time after it, and ask for Python's lock to do so; they
    abort a process whose interpreter ends meanwhile. They end with the last reference to their group, and a trainer
    that is done with is in cycles that hold one: so these are collected, and the one here is the last.
    """
    if distributed.is_available() and distributed.is_initialized():
        on_gpus = "nccl" in distributed.get_backend()
        group = distributed.group.WORLD
        distributed.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)
        distributed.destroy_process_group()
        gc.collect()
        del group  # without Python's lock, and waits for its threads


def gather(x: Tensor, group: ProcessGroup) -> Waiting:
    """Start to put the `x` of all ranks behind each other along dimension 0."""
    # Of torch.distributed's own, 2.13 warns of the name that 2.11 has.
    functional = torch.ops._c10d_functional
    coming = functional.all_gather_into_tensor(x, distributed.get_world_size(group), group.group_name)
    return lambda: functional.wait_tensor(coming)


class Exchange:
    """Tensors `[N, ...]` on their way between N ranks: part n goes to rank n, and what arrives there is its sender's.

    The parts of all tensors for other ranks leave together, packed where they are not contiguous. A rank's own parts
    are copied to their places meanwhile: sent, they would keep multiprocessors from the attention that runs beside.

    An exchange is its own transpose. One object serves both passes, with one exchange under way at a time.

    Attributes:
        ranks: N.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._rank = group, distributed.get_rank(group)
        self.ranks = distributed.get_world_size(group)
        self._sent: tuple[list[Work], list[Sequence[Tensor]]] = [], []
        self._coming: tuple[Tensor, ...] = ()

    def start(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Start to send tensors of any strides, and return what is on its way, contiguous: it is for after `wait`."""
        assert not self._coming, "what was started before has not been waited for"
        self._coming = tuple(x.new_empty(x.shape) for x in tensors)
        sent = [self._packed(x) for x in tensors]
        operations = [
            distributed.P2POp(operation, parts[peer], group=self._group, group_peer=peer)
            for peer in range(self.ranks)
            for going, coming in zip(sent, self._coming, strict=True)
            for operation, parts in ((distributed.isend, going), (distributed.irecv, coming))
            if peer != self._rank and coming.numel()
        ]
        # Parts are kept until they have left.
        self._sent = (distributed.batch_isend_irecv(operations) if operations else []), sent
        for coming, x in zip(self._coming, tensors, strict=True):
            copy_into(coming[self._rank], x[self._rank])
        return self._coming

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for what is under way and return it; no tensors, where nothing is."""
        (works, parts), coming = self._sent, self._coming
        self._sent, self._coming = ([], []), ()  # nobody waits twice for what fails
        for work in works:
            work.wait()
        del parts
        return coming

    def _packed(self, x: Tensor) -> Sequence[Tensor]:
        """Return the parts of `x`, those for other ranks contiguous: two copies at most, whatever their number."""
        before, after = x[: self._rank], x[self._rank + 1 :]
        return [*contiguous(before), x[self._rank], *contiguous(after)]


def started(exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Start an exchange with gradients. What it returns is on its way: it is for `arrived` alone.

    In the backward pass `arrived` starts the exchange of gradients, and `started` waits for it. Those of calls that
    were made one after another are under way together there too.
    """
    return _Started.apply(exchange, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def arrived(exchange: Exchange, *coming: Tensor) -> tuple[Tensor, ...]:
    """Wait for all that was started together, and return it."""
    return _Arrived.apply(exchange, *coming)  # type: ignore[no-any-return, no-untyped-call]


class _Started(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.start(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *coming: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.wait()
        return None, *coming


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *coming: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        ctx.mark_non_differentiable(*(x for i, x in enumerate(coming) if not ctx.needs_input_grad[1 + i]))
        exchange.wait()
        return coming

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        coming = iter(ctx.exchange.start(*(x for x, its in zip(gradients, needed, strict=True) if its)))
        return None, *(next(coming) if its else None for its in needed)


def sum_parts(x: Tensor, group: ProcessGroup) -> Waiting:
    """Start to sum over all ranks, of which rank n gets the n-th part along dimension 0.

    The parts travel as they are and are summed in fp32: as many bytes as a reduce-scatter, which would round to the
    dtype of `x` at every rank, and the same sum each time.
    """
    exchange = Exchange(group)
    exchange.start(x.view(exchange.ranks, -1, *x.shape[1:]))
    return lambda: exchange.wait()[0].sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
