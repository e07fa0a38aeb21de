"""Launches that cost the host little: what depends on shapes alone is worked out once.

Triton looks at every argument of every launch, since a kernel is compiled for properties of all of them. A call makes a
dozen launches of up to 45 arguments each, and at short lengths that takes longer than the GPU needs. The numbers of a
`Launch` are fixed: which compiled kernel it runs depends on its tensors' dtypes and alignments alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import driver

REMEMBERED = 4096
"""Shapes whose launches are kept, about 12 KB each; a call of another one works everything out anew."""

ALIGNED = 16
"""Bytes; all that Triton asks of an address."""


class Launched(NamedTuple):
    """A launch that was made: the compiled kernel, None of Triton's interpreter, and its arguments."""

    compiled: Any
    grid: tuple[int, ...]
    tensors: tuple[Any, ...]
    rest: tuple[Any, ...]


class _Notes(threading.local):
    launches: list[Launched] | None = None


_notes = _Notes()


@contextmanager
def noted_launches() -> Iterator[list[Launched]]:
    """Collect the launches that this thread makes; they keep their tensors, and thus each its own memory."""
    launches: list[Launched] = []
    _notes.launches = launches
    try:
        yield launches
    finally:
        _notes.launches = None


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
        watched = is_watched()
        if compiled is None or watched:
            compiled = self._kernel[self.grid](*tensors, *self._numbers, **self._constants)
            if not watched:  # profilers have kernels of their own compiled
                self._compiled[kinds] = compiled
        else:
            # As CompiledKernel.__getitem__ does, less what it prepares for hooks; for tensors the launcher would ask
            # the driver where they are.
            stream = driver.active.get_current_stream(device)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*self.grid, stream, function, metadata, None, None, None, *pointers, *self._rest)
        if _notes.launches is not None:
            _notes.launches.append(Launched(compiled, self.grid, tensors, self._rest))


def is_watched() -> bool:
    """Whether a profiler wants to hear of launches: Triton's own way calls its hooks."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
