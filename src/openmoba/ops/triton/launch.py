"""Launches that cost the host little: what depends on shapes alone is worked out once.

Triton looks at every argument of every launch, since a kernel is compiled for properties of all of them. A call makes a
dozen launches of up to 45 arguments each, and at short lengths that takes longer than the GPU needs. The numbers of a
`Launch` are fixed: which compiled kernel it runs depends on its tensors' dtypes and alignments alone.

Such a launch calls what Triton keeps to itself, so it is made with the versions of Triton it was tested with. With
others, and with OPENMOBA_FIXED_LAUNCHES=0, Triton makes every launch, and nothing is replayed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.runtime import driver

REMEMBERED = 4096
"""Shapes whose launches are kept, about 12 KB each; a call of another one works everything out anew."""

ALIGNED = 16
"""Bytes; all that Triton asks of an address."""


_FIRST_TESTED, _LAST_TESTED = (3, 6), (3, 9)  # by `make test-triton`
TESTED = "Triton {}.{} to {}.{}".format(*_FIRST_TESTED, *_LAST_TESTED)


def is_tested(version: str) -> bool:
    """Whether what depends on the inside of Triton was tested with this version of it."""
    return _FIRST_TESTED <= tuple(map(int, version.split(".")[:2])) <= _LAST_TESTED


def _are_fixed(asked: str | None, version: str) -> bool:
    """Whether launches go around Triton's look at arguments, with this OPENMOBA_FIXED_LAUNCHES and this Triton."""
    if asked not in (None, "0", "1"):
        raise ValueError(f"OPENMOBA_FIXED_LAUNCHES must be 0 or 1, got {asked!r}")
    return asked != "0" and is_tested(version)


_FIXED = _are_fixed(os.environ.get("OPENMOBA_FIXED_LAUNCHES"), triton.__version__)


class Launched(NamedTuple):
    """A launch that was made: the compiled kernel, None of Triton's interpreter, and its arguments."""

    compiled: Any
    grid: tuple[int, ...]
    tensors: tuple[Any, ...]
    rest: tuple[Any, ...]


class Notes:
    """The launches of this package that a thread makes, and how many it makes in all by Triton's own count."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.counted = 0


class _Current(threading.local):
    notes: Notes | None = None


_current = _Current()


@contextmanager
def noted_launches() -> Iterator[Notes]:
    """Note the launches that this thread makes; they keep their tensors, and thus each its own memory."""
    notes = Notes()
    hook = knobs.runtime.launch_enter_hook
    _current.notes = notes
    hook.add(_count)
    try:
        yield notes
    finally:
        hook.remove(_count)
        _current.notes = None


def _count(_: Any) -> None:
    """Triton's hook before every launch of any thread."""
    if _current.notes is not None:
        _current.notes.counted += 1


class Launch:
    """A kernel with everything but its tensors, which come first among its parameters.

    Args:
        kernel: of `triton.jit` or `gluon.jit`, with parameters in the order tensors, numbers, constants.
        grid: programs in each of up to three dimensions.
        numbers: the arguments behind the tensors, in order.
        constants: by name, with Triton's options such as `num_warps`.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], constants: dict[str, Any]
    ) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self._kernel, self._numbers, self._constants = kernel, numbers, constants
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Any) -> None:
        """`kernel[grid](*tensors, *numbers, **constants)`; the first tensor's device is the current one."""
        device = tensors[0].get_device()
        pointers = [x if x is None else x.data_ptr() for x in tensors]
        dtypes = [x if x is None else x.dtype for x in tensors]
        kinds = (device, *dtypes, *[x if x is None else x % ALIGNED == 0 for x in pointers])
        compiled = self._compiled.get(kinds)
        fixed = may_be_fixed()
        notes = _current.notes
        if compiled is None or not fixed or notes is not None:  # Triton counts what is noted
            compiled = self._kernel[self.grid](*tensors, *self._numbers, **self._constants)
            if fixed:
                self._compiled[kinds] = compiled
        else:
            # As CompiledKernel.__getitem__ does, less what it prepares for hooks; for tensors the launcher would ask
            # the driver where they are.
            stream = driver.active.get_current_stream(device)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*self.grid, stream, function, metadata, None, None, None, *pointers, *self._rest)
        if notes is not None:
            notes.launches.append(Launched(compiled, self.grid, tensors, self._rest))


def may_be_fixed() -> bool:
    """Whether launches may go around Triton: unless a profiler wants to hear of them, and has its own kernels."""
    return _FIXED and not _is_watched()


def _is_watched() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    calls = getattr(enter, "calls", enter)
    return bool((calls and calls != [_count]) or getattr(leave, "calls", leave))
