"""The longest window that fits: doubled until one does not, then bisected to an eighth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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

    return _search(case.tokens, attempt, takes_too_long)


def _search(start: int, attempt: Callable[[int], Longest], takes_too_long: Callable[[Longest, int], bool]) -> Longest:
    """The longest that `attempt` says has no limit, with the limit of what is longer."""
    best: Longest | None = None
    tokens, step = start, max(1, start // 8)
    while True:
        if best is not None and takes_too_long(best, tokens):
            return replace(best, limit="time")
        found = attempt(tokens)
        if found.limit:
            break
        best, tokens = found, 2 * tokens
    fits, fails, limit = best.tokens if best else 0, tokens, found.limit
    while fails - fits > max(step, fits // 8):
        tokens = (fits + fails) // 2 // step * step
        found = attempt(tokens)
        if found.limit:
            fails, limit = tokens, found.limit
        else:
            best, fits = found, tokens
    if best is None:
        raise ValueError(f"not even {fails} tokens fit: {limit}")
    return replace(best, limit=limit)
