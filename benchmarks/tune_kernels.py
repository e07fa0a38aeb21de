"""Time every Triton kernel of one call, and one kernel with other tiles, on a CUDA GPU.

    python benchmarks/tune_kernels.py --tokens 32768 --head-dim 128 --block-size 128 --top-k 8
    python benchmarks/tune_kernels.py --passes forward --tokens 131072 --block-size 128 --top-k 8
    python benchmarks/tune_kernels.py --family portable --step attend_past --try 64,128,4,3,1024 128,128,8,5,1024
    python benchmarks/tune_kernels.py --family hopper --step key_gradients --try 64,128,8,2,4096

The first form prints what each kernel in the forward and the backward takes, from torch's profiler, and each module of
`openmoba.ops.triton`: `gate` chooses, `plan` makes lists, `hopper.forward` reads past blocks, `hopper.own_queries`
reads the own block and merges. The call is timed by CUDA events as well: what it has beyond its kernels is the host's.
The second form does that of one pass. With `--family portable`, its kernels run also where Hopper's own would serve.
With `--step`, one function of that family's tuning table, such as `openmoba.ops.triton.hopper.tuning`, is replaced by
each of the given tiles (M, N, warps, stages, segment) in turn.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from openmoba.bench.timing import Work, measure
from openmoba.bench.training.profiles import own_kernels
from openmoba.ops.arguments import Blocking
from openmoba.ops.triton import attend, attention, gradients, hopper, portable
from openmoba.ops.triton.family import Tile
from openmoba.ops.triton.host import replay

REPEATS = 5
TUNING = {"hopper": hopper.tuning, "portable": portable.tuning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--passes", choices=("forward", "backward", "both"), default="both")
    parser.add_argument("--family", choices=tuple(TUNING), default="hopper", help="whose kernels run, if they can")
    parser.add_argument("--step", help="function of the family's tuning table to replace")
    parser.add_argument("--try", dest="tiles", nargs="+", default=[], help="M,N,warps,stages,segment")
    options = parser.parse_args()
    call = prepare(options)
    tuning = TUNING[options.family]
    if options.step and not hasattr(tuning, options.step):
        raise SystemExit(f"error: --step must be a function of {tuning.__name__}, got {options.step!r}")
    alone = options.family == "portable"
    with patch.object(hopper, "is_available", lambda _: False) if alone else nullcontext():
        show("as tuned", call)
        for text in options.tiles:
            m, n, warps, stages, segment = map(int, text.split(","))
            sizes = {"m": m, "n": n, "warps": warps, "stages": stages, "segment": segment}
            with replaced(tuning, options.step, sizes):
                show(text, call)


@contextmanager
def replaced(tuning: ModuleType, step: str, sizes: dict[str, int]) -> Iterator[None]:
    """Let one step have a tile of these sizes."""
    original: Callable[..., Tile] = getattr(tuning, step)
    with patch.object(tuning, step, lambda *arguments: replace(original(*arguments), **sizes)):
        forget()
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """Let tiles be chosen anew."""
    for cached in (attend._launches, gradients._launches, attention._fitting_heads):
        cached.cache_clear()
    replay.forget()


def prepare(options: argparse.Namespace) -> Callable[[], Tensor]:
    """Make the passes on standard normal bf16 inputs."""
    q, d_out = (torch.randn(1, options.tokens, options.heads, options.head_dim) for _ in range(2))
    k, v = (torch.randn(1, options.tokens, options.kv_heads, options.head_dim) for _ in range(2))
    q, d_out, k, v = (x.to("cuda", torch.bfloat16) for x in (q, d_out, k, v))
    settings = (Blocking(None, None, options.block_size, options.top_k), options.head_dim**-0.5)

    kept = attention.forward(q, k, v, None, *settings)

    def call() -> Tensor:
        results = kept if options.passes == "backward" else attention.forward(q, k, v, None, *settings)
        if options.passes == "forward":
            return results[0]
        return attention.backward(d_out, None, q, k, v, *results, *settings)[0]

    return call


def show(label: str, call: Callable[[], Tensor]) -> None:
    """Print the mean milliseconds of the call, of each module and of each kernel, longest first."""
    try:
        call()
    except Exception as error:  # a tile that does not fit the card
        print(f"{label}: {error}")
        return
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    own = own_kernels()
    kernels: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        kernels[event.name[:60]] += event.device_time / 1000 / REPEATS
        modules[own.get(event.name, "torch")] += event.device_time / 1000 / REPEATS
    call_ms = measure(Work(call), torch.device("cuda")).p50_ms
    print(f"{label}: the call {call_ms:.3f} ms, its kernels {sum(kernels.values()):.3f} ms")
    for values in (modules, kernels):
        for name, value in sorted(values.items(), key=lambda item: -item[1])[:12]:
            print(f"  {value:8.3f}  {value / sum(values.values()):4.0%}  {name}")


if __name__ == "__main__":
    main()
