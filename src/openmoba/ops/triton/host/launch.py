"""Launches that cost the host little: what depends on shapes alone is worked out once.

Triton looks at every argument of every launch, since a kernel is compiled for properties of all of them. A call makes a
dozen launches of up to 45 arguments each, and at short lengths that takes longer than the GPU needs. The numbers of a
`Launch` are fixed: which compiled kernel it runs depends on its tensors' dtypes and alignments alone.

Such a launch goes around Triton where that may be (`direct`); elsewhere Triton makes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from openmoba.ops.triton.host.direct import current_stream, direct_launch, heard_launches, may_go_around

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
    _current.notes = notes
    with heard_launches(_count):
        try:
            yield notes
        finally:
            _current.notes = None


def _count(_: Any) -> None:
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
        self._direct: dict[tuple[Any, ...], Callable[[int, Sequence[int | None]], None]] = {}

    def __call__(self, *tensors: Any) -> None:
        """Do `kernel[grid](*tensors, *numbers, **constants)`; the first tensor's device is the current one."""
        device = tensors[0].get_device()
        pointers = [x if x is None else x.data_ptr() for x in tensors]
        dtypes = [x if x is None else x.dtype for x in tensors]
        kinds = (device, *dtypes, *[x if x is None else x % ALIGNED == 0 for x in pointers])
        direct, around, notes = self._direct.get(kinds), may_go_around(), _current.notes
        if direct is not None and around and notes is None:
            direct(current_stream(device), pointers)
            return
        compiled = self._kernel[self.grid](*tensors, *self._numbers, **self._constants)
        if around and compiled is not None:  # Triton's interpreter compiles nothing
            self._direct[kinds] = direct_launch(compiled, self.grid, self._rest)
        if notes is not None:  # Triton has counted the launch
            notes.launches.append(Launched(compiled, self.grid, tensors, self._rest))
