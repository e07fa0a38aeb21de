"""The one place that uses what Triton keeps to itself: a compiled kernel's launcher, and who listens to launches.

It is used with the versions of Triton that it was tested with. With others, and with OPENMOBA_FIXED_LAUNCHES=0, Triton
makes every launch, and nothing is replayed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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


class Source(NamedTuple):
    """What a launcher is made for: the types of a kernel's arguments, without constants and one level deep."""

    signature: dict[int, str]
    constants: dict[Any, Any]


def taken_arguments(compiled: Any) -> dict[int, str]:
    """Return number and type of the arguments that a compiled kernel takes, counted with those that are constants.

    Members of a struct count as arguments.
    """
    types = enumerate(_members(compiled.src.signature.values()))
    return {number: kind for number, kind in types if kind != "constexpr"}


def _members(types: Iterable[Any]) -> Iterator[str]:
    for kind in types:
        if isinstance(kind, tuple):
            yield from _members(kind)
        else:
            yield kind


def direct_launch(compiled: Any, grid: tuple[int, ...]) -> Callable[[int, Sequence[Any]], None]:
    """Return a launch of a compiled kernel on a stream, with what `taken_arguments` names: addresses and numbers.

    Triton's own launcher takes structs apart and looks at constants every time, and would ask the driver where tensors
    are. This one is called as Triton calls its own, less what that prepares for hooks.
    """
    run = driver.active.launcher_cls(Source(taken_arguments(compiled), {}), compiled.metadata)
    before = (compiled.function, compiled.packed_metadata, None, None, None)

    def launch(stream: int, arguments: Sequence[Any]) -> None:
        run(*grid, stream, *before, *arguments)

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
