"""Whether the ranks of a group call alike: with tensors of other shapes they send what the others do not expect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, distributed

from openmoba.ops.eager import eager
from openmoba.parallel.collectives import gather
from openmoba.parallel.sharding import Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def different(told: Tensor, group: ProcessGroup) -> list[int]:
    """Return which of the numbers `told`, int64 `[M]`, are not the same on all ranks; the host waits for them."""
    if "nccl" in distributed.get_backend(group):
        told = told.to(torch.device("cuda", torch.cuda.current_device()))
    every = zip(*gather(told[None], group)().tolist(), strict=True)
    return [i for i, numbers in enumerate(every) if len(set(numbers)) > 1]


@eager("compilers do not trace transfers")
def check_alike(sharding: Sharding, **tensors: Tensor | None) -> None:
    """Raise ValueError, on all ranks, unless they call with one sharding, and with tensors of one shape and dtype.

    Only on a CPU, where it is one all-gather of a few numbers: on a GPU the host would wait for the device at every
    call. None among the tensors is for what is not sent.
    """
    if sharding.ranks == 1 or any(x is not None and x.device.type != "cpu" for x in tensors.values()):
        return
    starts = sharding.cu_seqlens
    called: dict[str, Any] = {name: x if x is None else (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    called |= {name: getattr(sharding, name) for name in ("tokens", "layout", "way")}
    called["cu_seqlens"] = starts if starts is None else starts.tolist()
    wrong = different(torch.tensor([crc32(repr(x).encode()) for x in called.values()]), sharding.group)
    if wrong:
        here = ", ".join(f"{name} {value}" for i, (name, value) in enumerate(called.items()) if i in wrong)
        raise ValueError(
            f"the {sharding.ranks} ranks that share a sequence do not call alike: rank {sharding.rank} has {here}, "
            "another rank has not; give all of them the same batch, heads, dtype and sharding"
        )
