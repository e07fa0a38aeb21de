"""Replay: the launches of a short call, without the Python that works them out.

A short call's kernels are done before Python has worked out its dozen launches. Which kernels run, with which numbers
and temporaries, depends on shapes alone, so the first call of a kind is written down, and later ones allocate all
temporaries at once, add up addresses and launch: what a CUDA graph does on the device, for the host, and on new tensors
each time. A call that does more than allocate and launch, such as sort, is worked out every time. So is one in which
Triton counts more launches than were noted: the others would be missing from every later call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmoba.ops.triton.host.direct import current_stream, may_go_around
from openmoba.ops.triton.host.launch import ALIGNED, REMEMBERED, Launched, noted_launches

_recording = Lock()  # torch tells whether a dispatch mode is on by one flag for all threads
_BETWEEN = 256  # bytes; temporaries begin at multiples of them
_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty.memory_format, _aten.new_empty.default}
_VIEWS = {_aten.slice.Tensor, _aten.select.int, _aten.unbind.int}


def replayed(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    settings: tuple[float, ...],
    caps: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Return `function(*inputs, *settings)`: new contiguous tensors on the first input's device.

    Its launches may depend on devices, dtypes, shapes and strides, on the settings, and on the caps on its memory in
    bytes. A call whose temporaries exceed them is not replayed, since it would hold all at once.
    """
    first = inputs[0]
    assert first is not None
    pointers = [0 if x is None else x.data_ptr() for x in inputs]
    together = 0
    for pointer in pointers:
        together |= pointer
    if together % ALIGNED or not may_go_around():
        return function(*inputs, *settings)
    shapes = [x if x is None else (x.dtype, x.shape, x.stride()) for x in inputs]
    kind = _kind(function, first.get_device(), settings, caps, *shapes)
    if kind.tape is not None:
        return kind.tape.play(first, pointers)
    if not kind.recordable or _repeat(inputs):
        return function(*inputs, *settings)
    outputs, tape = _record(function, inputs, settings)
    kind.tape = tape if tape is not None and tape.scratch <= max(caps) else None
    kind.recordable = kind.tape is not None
    return outputs


def forget() -> None:
    """Write every kind of call down anew; for tests that change how launches are worked out."""
    _kind.cache_clear()


class _Kind:
    """Calls that make the same launches: their tape, once there is one."""

    def __init__(self) -> None:
        self.tape: _Tape | None = None
        self.recordable = True


@lru_cache(maxsize=REMEMBERED)
def _kind(*_: Any) -> _Kind:
    return _Kind()


class _Tape:
    """The launches of a call, and the bytes of its temporaries, `scratch`."""

    def __init__(self, launches: Sequence[Launched], places: _Places, outputs: Sequence[Tensor]) -> None:
        self._outputs = [(x.shape, x.dtype) for x in outputs]
        self._launches = []
        known: dict[tuple[type, float], int] = {}
        for direct, tensors, numbers in launches:
            assert direct is not None
            begins = [x if x is None else places.number(x) for x in tensors]
            # Addresses come first among the values, numbers from the end: how many there are shows at the end.
            where = [*begins, *[~known.setdefault((type(x), x), len(known)) for x in numbers]]
            self._launches.append((direct.launch, itemgetter(*[where[place] for place in direct.places])))
        self._numbers = [number for _, number in reversed(known)]
        self._places, self.scratch = places.places, places.scratch

    def play(self, first: Tensor, pointers: list[int]) -> tuple[Tensor, ...]:
        """Launch the same on other tensors: the first input, and where all begin (0: absent)."""
        outputs = tuple([first.new_empty(shape, dtype=dtype) for shape, dtype in self._outputs])
        scratch = first.new_empty(self.scratch, dtype=torch.uint8)
        begins = [*pointers, *[x.data_ptr() for x in outputs], scratch.data_ptr()]
        values = [*[begins[tensor] + offset for tensor, offset in self._places], *self._numbers]
        stream = current_stream(first.get_device())
        for launch, pick in self._launches:
            launch(stream, pick(values))
        return outputs


class _Places:
    """Where the tensors of a call lie, as bytes behind the beginning of an input, an output, or the temporaries.

    Attributes:
        places: (number of the input or output, or of the temporaries behind them; offset), each once.
        scratch: bytes of all temporaries.
    """

    def __init__(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        self.places: list[tuple[int, int]] = []
        self.scratch = 0
        self._inputs = inputs
        self._temporaries = len(inputs) + len(outputs)
        self._begins: dict[int, tuple[int, int]] = {}  # storage -> the same number, address of offset 0
        self._shared: set[int] = set()  # storages of several inputs: which of them a view is of is unknown
        for number, x in enumerate((*inputs, *outputs)):
            if x is not None:
                if _storage(x) in self._begins:
                    self._shared.add(_storage(x))
                self._begins[_storage(x)] = number, x.data_ptr()

    def number(self, x: Tensor) -> int:
        """Return the index in `places` of where a tensor begins."""
        place = self._place(x)
        if place not in self.places:
            self.places.append(place)
        return self.places.index(place)

    def _place(self, x: Tensor) -> tuple[int, int]:
        for number, known in enumerate(self._inputs):
            if known is x:
                return number, 0
        storage = _storage(x)
        assert storage not in self._shared
        if storage not in self._begins:
            self._begins[storage] = self._temporaries, storage - self.scratch
            self.scratch += -(-x.untyped_storage().nbytes() // _BETWEEN) * _BETWEEN
        number, begin = self._begins[storage]
        return number, x.data_ptr() - begin


def _record(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], settings: tuple[float, ...]
) -> tuple[tuple[Tensor, ...], _Tape | None]:
    """Run the function; return its results, and its tape if noted launches are all that it did."""
    with _recording, noted_launches() as notes, _Watch() as watch:
        outputs = function(*inputs, *settings)
    all_noted = notes.counted == len(notes.launches) and all(launched.direct for launched in notes.launches)
    if not watch.launches_alone or not all_noted:
        return outputs, None
    return outputs, _Tape(notes.launches, _Places(inputs, outputs), outputs)


def _repeat(inputs: Sequence[Tensor | None]) -> bool:
    """Say whether one tensor is several inputs: a launch would not tell which of them it reads."""
    given = [id(x) for x in inputs if x is not None]
    return len(set(given)) < len(given)


class _Watch(TorchDispatchMode):
    """Sees whether operations of torch do more than allocate and make views."""

    launches_alone = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches_alone &= func in _ALLOCATIONS or func in _VIEWS
        return func(*args, **(kwargs or {}))


def _storage(x: Tensor) -> int:
    """Return the address of what x is a view of."""
    return x.untyped_storage().data_ptr()
