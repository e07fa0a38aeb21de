"""The longest window that fits, to an eighth: longer and longer, as far as memory grows, then bisected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from openmoba.bench.machine import Machine, failure, say
from openmoba.bench.rows import length_name
from openmoba.bench.training.cases import TrainingCase
from openmoba.bench.training.loops import BareLoop, operations
from openmoba.bench.training.watch import Watch


@dataclass(frozen=True)
class Longest:
    """The longest window found, the watch of its steps, and why there is no longer one: an error, or "time"."""

    loop: BareLoop
    tokens: int
    watch: Watch
    limit: str


def find_longest(case: TrainingCase, machine: Machine, seconds: float) -> Longest:
    """Search from `case.tokens` on. A window fits if two steps do, of which the second is timed.

    Args:
        seconds: a longer window is not tried if a step of it would take longer.

    Raises:
        ValueError: not even an eighth of `case.tokens` fits.
    """
    loop = BareLoop(case, machine.device)

    def attempt(tokens: int) -> Longest:
        loop.give(tokens)
        watch = Watch(machine.device, warmup=1, fewest=1, most=1, profiled=0)
        try:
            watch.run(loop)
        except Exception as error:  # out of memory, or a limit of some kernel's indices: no longer window works
            loop.optimizer.zero_grad()
            limit = failure(error)
        else:
            limit = ""
        machine.tidy()
        took = limit or f"{watch.times_ms[0] / 1000:.2f} s a step"
        say(f"  {' '.join(case.words)}: {length_name(tokens)} tokens: {took}")
        return Longest(loop, tokens, watch, limit)

    def takes_too_long(best: Longest, tokens: int) -> bool:
        ratio = operations(case, loop.model, tokens) / operations(case, loop.model, best.tokens)
        return best.watch.times_ms[0] * ratio > 1000 * seconds

    return _search(case.tokens, attempt, takes_too_long, _capacity_mb(machine.device))


def _search(
    start: int,
    attempt: Callable[[int], Longest],
    takes_too_long: Callable[[Longest, int], bool],
    capacity_mb: float | None = None,
) -> Longest:
    """Return the longest that `attempt` says has no limit, and the limit of what is longer."""
    fits: list[Longest] = []
    tokens, step = start, max(1, start // 8)
    while not (found := attempt(tokens)).limit:
        fits.append(found)
        wanted = [tokens for tokens in _longer(fits, capacity_mb, step) if not takes_too_long(found, tokens)]
        if not wanted:
            return replace(found, limit="time")
        tokens = wanted[0]
    limit = found.limit
    while tokens - (low := fits[-1].tokens if fits else 0) > max(step, low // 8):
        middle = (low + tokens) // 2 // step * step
        found = attempt(middle)
        if found.limit:
            tokens, limit = middle, found.limit
        else:
            fits.append(found)
    if not fits:
        raise ValueError(f"not even {tokens} tokens fit: {limit}")
    return replace(fits[-1], limit=limit)


def _longer(fits: Sequence[Longest], capacity_mb: float | None, step: int) -> list[int]:
    """Choose what to try next: what the memory of the last two leads to expect to fit, or twice the last."""
    last = fits[-1]
    if capacity_mb is None or len(fits) < 2:
        return [2 * last.tokens]
    before = fits[-2]
    assert last.watch.peak_mb is not None
    assert before.watch.peak_mb is not None
    per_token = (last.watch.peak_mb - before.watch.peak_mb) / (last.tokens - before.tokens)
    expected = int(last.tokens + (capacity_mb - last.watch.peak_mb) / max(per_token, 1e-9))
    expected -= expected % max(step, last.tokens // 8)
    nearest = last.tokens + max(step, last.tokens // 8)
    return [max(nearest, min(expected, 16 * last.tokens)), 2 * last.tokens]


def _capacity_mb(device: torch.device) -> float | None:
    """Estimate what tensors may take of a GPU's memory; some is the driver's, and some is lost between them."""
    return 0.96 * torch.cuda.mem_get_info(device)[1] / 1e6 if device.type == "cuda" else None
