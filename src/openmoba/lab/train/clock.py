"""The time a run takes, and how fast that is."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from openmoba.lab.measure.compute import PFLOPS_DAY

PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
"""Dense bf16 operations per second, by the device's name, as in NVIDIA's data sheets: what MFU is a share of.

No matrix product reaches them. `openmoba bench training` divides by the rate that it measures of one, some 690e12 on an
H200, so its shares are larger.
"""


class Clock:
    """Wall seconds of the run, and the seconds that its devices trained, over all attempts at it.

    Args:
        device: that of this process.
        devices: how many train together.

    Attributes:
        trained: wall seconds of the training steps of this attempt.
    """

    def __init__(self, device: torch.device, devices: int) -> None:
        self.device, self.devices, self.trained = device, devices, 0.0
        self._before = 0.0
        self._start = self._mark = time.perf_counter()

    def go_on(self, seconds: float, accelerator_seconds: float) -> None:
        """Add what the earlier attempts took, on however many devices they were."""
        self._start -= seconds
        self._before += accelerator_seconds

    @property
    def seconds(self) -> float:
        """Wall seconds so far."""
        return time.perf_counter() - self._start

    @property
    def accelerator_seconds(self) -> float:
        """Seconds of training steps so far, summed over devices."""
        return self._before + self.trained * self.devices

    def tick(self) -> None:
        """Count the time since the last mark as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.trained += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Count the time since the last mark as something else."""
        self._mark = time.perf_counter()


class Speedometer:
    """Tokens per second, and their share of what the devices could do, from one record of training to the next.

    Args:
        peak: operations per second of all devices together, by their data sheets; None if it is not known.
    """

    def __init__(self, peak: float | None) -> None:
        self.peak = peak
        self._last = (0, 0.0, 0.0)

    def start(self, tokens: int, seconds: float, pflops_days: float) -> None:
        """Measure from here on."""
        self._last = (tokens, seconds, pflops_days)

    def read(self, tokens: int, seconds: float, pflops_days: float) -> dict[str, float | None]:
        """Read the speed since the last reading.

        Args:
            tokens, seconds: trained so far, over all devices, in so many seconds of training steps.
            pflops_days: the operations of these, causal-exact.
        """
        before, since, compute = self._last
        self._last = (tokens, seconds, pflops_days)
        took = seconds - since
        share = None if self.peak is None else (pflops_days - compute) * PFLOPS_DAY / took / self.peak
        return {"tokens_per_second": _short((tokens - before) / took), "mfu": None if share is None else _short(share)}


def peak_operations(device: torch.device, bf16: bool, devices: int) -> float | None:
    """Return the operations per second of the devices' data sheets; None in fp32 or where it is not known."""
    if device.type != "cuda" or not bf16:
        return None
    peak = PEAKS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * devices


def median_speed(rows: list[dict[str, Any]], peak: float | None) -> dict[str, float | None]:
    """Return the median speed of a run's records, which a slow first stretch does not move."""
    speeds = {name: [row[name] for row in rows if row.get(name) is not None] for name in ("tokens_per_second", "mfu")}
    return {name: median(found) if found else None for name, found in speeds.items()} | {"peak": peak}


def _short(number: float) -> float:
    return float(f"{number:.4g}")
