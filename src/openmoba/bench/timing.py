"""Time and peak memory of a call: CUDA events on a GPU, wall clock elsewhere.

The first call compiles, loads and plans, and is not timed. Before each timed call a buffer larger than the L2 cache is
overwritten, so that no call finds its inputs there. Calls are launched one after another without waiting, as in a
model; a call of a second or more is timed once, on a CPU three times, since other work may disturb it there.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

SECONDS = 0.7  # of samples per measurement
SLOW_MS = 1000.0
FEWEST, MOST = 3, 1000
_FLUSH_BYTES = 2**28
MB = 1e6


@dataclass(frozen=True)
class Work:
    """A call to time: `forward()`, and with `d_out` the gradients of `leaves` as well."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    d_out: Tensor | None = None

    def run(self, after_forward: Callable[[], None] = lambda: None) -> tuple[Tensor, ...]:
        """Call it; return the output and the gradients."""
        if self.d_out is None:
            with torch.no_grad():
                return (self.forward(),)
        out = self.forward()
        after_forward()
        return (out, *torch.autograd.grad(out, self.leaves, self.d_out))


@dataclass(frozen=True)
class Measurement:
    """Quantiles of the time in ms; peak memory of each pass above what the pass began with, in MB (10^6 bytes).

    The memory is None where there is no such pass, and on a CPU where the system does not tell. On a CPU it is that of
    the process.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    forward_mb: float | None
    backward_mb: float | None


def measure(work: Work, device: torch.device, agree: Callable[[list[float]], list[float]] = list) -> Measurement:
    """Time `work` on `device`.

    Args:
        agree: what several devices make of their times, so that all take as many samples; by default one's own.

    Raises:
        ArithmeticError: a result holds NaN or infinity.
    """
    for result in work.run():
        if not result.isfinite().all():
            raise ArithmeticError("the result holds NaN or infinity")
    del result
    gc.collect()  # else a collection during the call might free what was there before, and count as its memory
    times_ms = _event_times if device.type == "cuda" else _wall_times
    peaks = _Peaks(device)
    if device.type == "cuda":
        (first_ms,) = agree(times_ms(lambda: peaks.watch(work), 1))
    else:
        peaks.watch(work)  # apart, since the system takes its time to tell
        (first_ms,) = agree(times_ms(work.run, 1))
    samples = [first_ms]
    if first_ms < SLOW_MS or device.type != "cuda":
        samples = agree(times_ms(work.run, min(MOST, max(FEWEST, int(SECONDS * 1000 / first_ms)))))
    forward_mb, backward_mb = (*peaks.megabytes, None, None)[:2]
    return Measurement(*quantiles(samples), len(samples), forward_mb, backward_mb)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20, 50 and 80 % quantiles."""
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(wanted).tolist()
    return p20, p50, p80


def matrix_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """Measure a large square matrix product, the roofline's ceiling, in 10^12 operations per second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measure(Work(lambda: a @ b), device).p50_ms / 1e9


class _Peaks:
    """Peak memory of each pass above what it began with; the counts of the GPU's allocator need no waiting."""

    def __init__(self, device: torch.device) -> None:
        self.megabytes: list[float] = []
        self._device = device

    def watch(self, work: Work) -> None:
        """Run `work` and note its peaks."""
        if self._device.type != "cuda" and platform.system() != "Linux":
            work.run()
            return
        self._begin()
        work.run(self._mark)
        self._mark()

    def _mark(self) -> None:
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else _process_bytes("VmHWM")
        self.megabytes.append((peak - self._start) / MB)
        self._begin()

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self._start = _process_bytes("VmRSS")


def _process_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _event_times(call: Callable[[], object], samples: int) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(samples)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _wall_times(call: Callable[[], object], samples: int) -> list[float]:
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return times


def replayed(step: Callable[[], R]) -> Callable[[], R]:
    """Capture `step` in a CUDA graph, after a call that compiles it; what it reads lives as long as the replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay(_keeps: Callable[[], R] = step) -> R:
        graph.replay()
        return out

    return replay
