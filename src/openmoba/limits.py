"""Which numbers a setting may have: whole or real, within limits, and never NaN."""

from __future__ import annotations

import math

LARGEST = 2**31 - 1
"""The largest whole number: products of two still fit in 64 bits."""


def check_count(name: str, value: int | None, low: int, high: int = LARGEST) -> None:
    """Raise ValueError unless the setting `name` is None or a whole number in [low, high]."""
    if value is None:
        return
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")


def check_number(name: str, value: float | None, low: float, *, low_too: bool = True) -> None:
    """Raise ValueError unless the setting `name` is None or a finite number > `low`, or `low` itself if `low_too`."""
    if value is None:
        return
    if not (value > low or (low_too and value == low)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number {'>=' if low_too else '>'} {low:g}, got {value}")


def check_share(name: str, value: float, of: str = "", *, one_too: bool = True) -> None:
    """Raise ValueError unless the setting `name` is in [0, 1], or in [0, 1) without `one_too`."""
    if not 0 <= value <= 1 or (value == 1 and not one_too):
        raise ValueError(f"{name} is a share{of} in [0, 1{']' if one_too else ')'}, got {value}")
