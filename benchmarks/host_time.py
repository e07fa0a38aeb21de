"""Host time of one attention call whose kernels do nothing.

    python benchmarks/host_time.py

writes results/cpu/host_time.csv, medians in microseconds of forward, and of forward and backward:

    registered operation, around the dispatcher    an implementation that does nothing, through autograd
    Triton's dispatch, fixed launches, replayed    the Triton path without autograd, with a driver that runs nothing:
                                                   every launch by `kernel[grid](...)`, by `launch.Launch`, and all
                                                   as written down by `replay`
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from openmoba.ops import attend as operations
from openmoba.ops.arguments import Blocking
from openmoba.ops.triton import attention, hopper
from openmoba.ops.triton.host import replay
from openmoba.ops.triton.host.launch import Launch, filled
from openmoba.records.provenance import provenance

OUT = Path(__file__).parent.parent / "results" / "cpu" / "host_time.csv"
SMALL, BLOCKS = Blocking(None, None, 16, 3), Blocking(None, None, 128, 3)
SCALE = 0.25
ROUNDS, CALLS = 15, 400


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [{"path": path, "forward_us": forward, "both_us": both} for path, forward, both in measured()]
    source = provenance()
    origin = {"cpu": source["hardware"]["cpu"], "torch": torch.__version__, "commit": source["commit"]}
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | origin for row in rows)
    print(OUT.read_text(), end="")


def measured() -> Iterator[tuple[str, float, float]]:
    """Time each path: its name, microseconds of forward and of both passes."""
    q, k, v = (torch.randn(1, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    paths: dict[str, Callable[[], Tensor]] = {
        "registered operation": lambda: torch.ops.openmoba.attend("cpu", q, k, v, None, *SMALL, SCALE)[0],
        "around the dispatcher": lambda: operations.attend("cpu", q, k, v, None, SMALL, SCALE)[0],
    }
    d_out = torch.ones_like(q)
    with patch.object(operations, "backend", lambda _: SimpleNamespace(forward=forward, backward=backward)):
        for name, attend in paths.items():

            def both(attend: Callable[[], Tensor] = attend) -> Any:
                return torch.autograd.grad(attend(), (q, k, v), d_out)

            yield name, microseconds(attend), microseconds(both)
    launch_nothing()
    with patch.object(hopper, "is_available", lambda device: True):
        with patch.object(Launch, "__call__", launch_by_triton):
            yield "Triton's dispatch", *triton_microseconds(work_out)
        yield "fixed launches", *triton_microseconds(work_out)
        yield "replayed", *triton_microseconds(replay.replayed)


def triton_microseconds(call: Callable[..., Any]) -> tuple[float, float]:
    """Time Triton's path on 512 tokens, 32 query and 8 key/value heads, D 128."""
    q, d_out, k, v = (torch.zeros(1, 512, heads, 128, dtype=torch.bfloat16) for heads in (32, 32, 8, 8))

    cu_q, cu_k, *numbers = BLOCKS
    settings, caps = (*numbers, SCALE), attention.workspaces(q.device)

    def attend() -> Any:
        return call(flat_forward, (q, k, v, None, cu_q, cu_k), settings, caps)

    def both() -> Any:
        return call(flat_backward, (d_out, None, q, k, v, *attend(), cu_q, cu_k), settings, caps)

    return microseconds(attend), microseconds(both)


def flat_forward(*arguments: Any) -> Any:
    *tensors, cu_q, cu_k, block_size, top_k, scale = arguments
    return attention.forward(*tensors, Blocking(cu_q, cu_k, block_size, top_k), scale)  # of CPU tensors: not replayed


def flat_backward(*arguments: Any) -> Any:
    *tensors, cu_q, cu_k, block_size, top_k, scale = arguments
    return attention.backward(*tensors, Blocking(cu_q, cu_k, block_size, top_k), scale)


def work_out(
    function: Callable[..., Any], inputs: tuple[Tensor | None, ...], numbers: tuple[float, ...], _: Any
) -> Any:
    """Do as `replay.replayed` does, every time anew."""
    return function(*inputs, *numbers)


def launch_by_triton(launch: Launch, *tensors: Any) -> None:
    given = iter(tensors)
    launch._kernel[launch.grid](*[filled(x, given) for x in launch._arguments], **launch._constants)


def launch_nothing() -> None:
    """Make every kernel from here on be compiled for an H100, and never run."""
    properties = {"max_shared_mem": 232448}
    driver.set_active(
        SimpleNamespace(
            launcher_cls=lambda source, metadata: run_nothing,
            utils=SimpleNamespace(
                get_device_properties=lambda device: properties, load_binary=lambda *arguments: (0, 1, 255, 0, 1024)
            ),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )


def run_nothing(*arguments: Any) -> None:
    """Do nothing as a launcher, which tells those who listen to Triton's launches."""
    metadata, enter = arguments[6:8]
    if enter is not None:
        enter(metadata)


def forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an implementation returns, undefined."""
    return torch.empty_like(q), torch.empty(q.shape[:-1]), torch.empty(10, dtype=torch.int32)


def backward(d_out: Tensor, d_lse: None, *qkv: Any) -> tuple[Tensor, ...]:
    """Return gradients, undefined."""
    return tuple(torch.empty_like(x) for x in qkv[:3])


def microseconds(call: Callable[[], Any]) -> float:
    """Return the median over rounds of the mean of many calls."""
    call()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return round(median(times), 1)


if __name__ == "__main__":
    main()
