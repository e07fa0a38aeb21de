"""Watching steps: their times, the memory they take, and a profile of one of them or of a few."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from openmoba.bench.training.loops import Loop

WARMUP = 3
SECONDS = 3.0
FEWEST, MOST = 3, 20


@dataclass
class Watch:
    """What is seen of the steps of a loop, once `run` has made them.

    Attributes:
        times_ms: of the steps after the warm-up, one after another without waiting, as in training.
        first_ms: of the first step.
        peak_mb: most memory of the timed steps' tensors, 10^6 bytes; None on a CPU.
        held_mb: most memory that torch held meanwhile; a graph's tensors are counted here alone.
        profile: of the `profiled` steps after them.
    """

    device: torch.device
    warmup: int = WARMUP
    seconds: float = SECONDS
    fewest: int = FEWEST
    most: int = MOST
    profiled: int = 1
    times_ms: list[float] = field(default_factory=list)
    first_ms: float | None = None
    peak_mb: float | None = None
    held_mb: float | None = None
    profile: profile | None = None

    def run(self, loop: Loop) -> None:
        """Let `loop` make the steps."""
        loop.run(self._steps())

    def _steps(self) -> Iterator[None]:
        """Yield an item per step to make."""
        on_gpu = self.device.type == "cuda"
        start = time.perf_counter()
        for i in range(self.warmup):
            yield
            if i == 0:
                self._wait()
                self.first_ms = (time.perf_counter() - start) * 1000
        self._wait()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield from self._timed(_Marks(self.device))
        if on_gpu:
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / 1e6
            self.held_mb = torch.cuda.max_memory_reserved(self.device) / 1e6
        if self.profiled:
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 2 if on_gpu else 1]
            with profile(activities=activities, acc_events=True) as self.profile:
                for _ in range(self.profiled):
                    yield
                self._wait()

    def _timed(self, marks: _Marks) -> Iterator[None]:
        end = time.perf_counter() + self.seconds
        made = 0
        while made < self.fewest or (made < self.most and time.perf_counter() < end):
            yield
            marks.add()
            made += 1
        self._wait()
        self.times_ms = marks.between_ms()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Marks:
    """Points in time: CUDA events on a GPU, wall clock elsewhere; one now, and one for every `add`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.times: list[float] = []
        self.add()

    def add(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.events.append(event)
        self.times.append(time.perf_counter())

    def between_ms(self) -> list[float]:
        if self.on_gpu:
            return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]
        return [1000 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]
