"""The one place that uses what Triton keeps to itself: a compiled kernel's launcher, and who listens to launches.

It is used with the versions of Triton that it was tested with. With others, and with OPENMOBA_FIXED_LAUNCHES=0, Triton
makes every launch, and nothing is replayed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

_FIRST_TESTED, _LAST_TESTED = (3, 6), (3, 9)  # by `make test-triton`
TESTED = "Triton {}.{} to {}.{}".format(*_FIRST_TESTED, *_LAST_TESTED)


def is_tested(version: str) -> bool:
    """Say whether what depends on the inside of Triton was tested with this version of it."""
    return _FIRST_TESTED <= tuple(map(int, version.split(".")[:2])) <= _LAST_TESTED


def _is_on(asked: str | None, version: str) -> bool:
    """Say whether launches go around Triton, with this OPENMOBA_FIXED_LAUNCHES and this version of it."""
    if asked not in (None, "0", "1"):
        raise ValueError(f"OPENMOBA_FIXED_LAUNCHES must be 0 or 1, got {asked!r}")
    return asked != "0" and is_tested(version)


_ON = _is_on(os.environ.get("OPENMOBA_FIXED_LAUNCHES"), triton.__version__)


def direct_launch(
    compiled: Any, grid: tuple[int, ...], rest: tuple[Any, ...]
) -> Callable[[int, Sequence[int | None]], None]:
    """Return a launch of a compiled kernel on a stream with the addresses of its tensors.

    It does as Triton's `CompiledKernel.__getitem__`, less what that prepares for hooks; for tensors instead of
    addresses the launcher would ask the driver where they are. `rest` are all arguments behind the tensors.
    """
    run, before = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)

    def launch(stream: int, addresses: Sequence[int | None]) -> None:
        run(*grid, stream, *before, *addresses, *rest)

    return launch


def current_stream(device: int) -> int:
    """Return the stream that a GPU's next launches belong to."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def may_go_around() -> bool:
    """Say whether launches may go around Triton: unless a profiler wants to hear of them, and has its own kernels."""
    return _ON and not _is_watched()


@contextmanager
def heard_launches(hear: Callable[[Any], None]) -> Iterator[None]:
    """Call `hear` before every launch that Triton makes, of any thread."""
    hook = knobs.runtime.launch_enter_hook
    _ours.append(hear)
    hook.add(hear)
    try:
        yield
    finally:
        hook.remove(hear)
        _ours.remove(hear)


_ours: list[Callable[[Any], None]] = []


def _is_watched() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    calls = getattr(enter, "calls", enter)
    return bool((calls and calls != _ours) or getattr(leave, "calls", leave))
