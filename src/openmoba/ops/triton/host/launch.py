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
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple

from openmoba.ops.triton.host.direct import (
    current_stream,
    direct_launch,
    heard_launches,
    may_go_around,
    taken_arguments,
)

REMEMBERED = 4096
"""Shapes whose launches are kept, about 12 KB each; a call of another one works everything out anew."""

ALIGNED = 16
"""Bytes; all that Triton asks of an address."""


TENSOR = object()
"""Stands among the arguments of a `Launch` for a tensor that every call gives."""


class Direct(NamedTuple):
    """A launch around Triton, and what it takes: places in `(*tensors, *numbers)`, and what picks these."""

    launch: Callable[[int, Sequence[Any]], None]
    places: tuple[int, ...]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]


class Launched(NamedTuple):
    """A launch that was made; `direct` is None where Triton has to make it."""

    direct: Direct | None
    tensors: tuple[Any, ...]
    numbers: tuple[float, ...]


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
    """A kernel with everything but its tensors: a fixed launch.

    Args:
        kernel: of `triton.jit` or `gluon.jit`, with its constants last among the parameters.
        grid: programs in each of up to three dimensions.
        arguments: up to the constants: numbers, `TENSOR`, and structs of both (`arguments`).
        constants: by name, with Triton's options such as `num_warps`.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self._kernel, self._arguments, self._constants = kernel, arguments, constants
        members = list(_members(arguments))
        self._numbers = tuple(x for x in members if x is not TENSOR)
        tensors, numbers = count(), count(len(members) - len(self._numbers))
        self._order = [next(tensors if x is TENSOR else numbers) for x in members]
        self._direct: dict[tuple[Any, ...], Direct] = {}

    def __call__(self, *tensors: Any) -> None:
        """Launch with these in the places of `TENSOR`, in order; the first one's device is the current one."""
        device = tensors[0].get_device()
        pointers = [x if x is None else x.data_ptr() for x in tensors]
        dtypes = [x if x is None else x.dtype for x in tensors]
        kinds = (device, *dtypes, *[x if x is None else x % ALIGNED == 0 for x in pointers])
        direct, around, notes = self._direct.get(kinds), may_go_around(), _current.notes
        if direct is not None and around and notes is None:
            direct.launch(current_stream(device), direct.pick((*pointers, *self._numbers)))
            return
        assert len(tensors) == len(self._order) - len(self._numbers), "a tensor for each place"
        given = iter(tensors)
        compiled = self._kernel[self.grid](*[filled(x, given) for x in self._arguments], **self._constants)
        if direct is None and around and compiled is not None:  # Triton's interpreter compiles nothing
            places = tuple(self._order[number] for number in taken_arguments(compiled))
            direct = Direct(direct_launch(compiled, self.grid), places, itemgetter(*places))
            self._direct[kinds] = direct
        if notes is not None:  # Triton has counted the launch
            notes.launches.append(Launched(direct, tensors, self._numbers))


def _members(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Yield arguments, with the members of structs in the place of these."""
    for x in arguments:
        if isinstance(x, tuple):
            yield from _members(x)
        else:
            yield x


def filled(argument: Any, tensors: Iterator[Any]) -> Any:
    """Return an argument with the next tensors in the places of `TENSOR`."""
    if isinstance(argument, tuple):
        return type(argument)(*[filled(x, tensors) for x in argument])
    return next(tensors) if argument is TENSOR else argument
