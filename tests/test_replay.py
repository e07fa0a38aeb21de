"""Replay: what a call launched is launched again on other tensors; a call that does more is worked out every time."""

from __future__ import annotations

import ctypes
import gc
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from openmoba.ops.arguments import Blocking
from openmoba.ops.triton import attention
from openmoba.ops.triton.host import direct, replay
from openmoba.ops.triton.host.launch import TENSOR, Launch
from openmoba.ops.triton.host.replay import replayed

MB = 2**20
SIZE = 40


class Adder:
    """Stands for a kernel `z = x + y + summand` on SIZE int64, y perhaps absent; it knows addresses alone."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(zx: Adding, y: Tensor | None, summand: int) -> Any:
            direct.knobs.runtime.launch_enter_hook(None)  # as Triton does
            taken = [zx.z.data_ptr(), zx.x.data_ptr(), *[y.data_ptr() for y in (y,) if y is not None], summand]
            signature = {"zx": Adding("*i64", "*i64"), "y": "constexpr" if y is None else "*i64", "summand": "i32"}
            compiled = SimpleNamespace(metadata=None, function=7, packed_metadata="metadata")
            compiled.src = SimpleNamespace(signature=signature)
            launcher(None, None)(*grid, *HEAD, *taken)
            return compiled

        return compile_and_run


def launcher(_: Any, __: Any) -> Any:
    """Stands for Triton's `launcher_cls`."""

    def run(*args: Any) -> None:
        assert args[:9] == (1, 1, 1, *HEAD)
        *addresses, summand = args[9:]
        z, x, *y = ((ctypes.c_int64 * SIZE).from_address(at) for at in addresses)
        for i in range(SIZE):
            z[i] = x[i] + summand + sum(its[i] for its in y)

    return run


class Adding(NamedTuple):
    z: Any
    x: Any


HEAD = ("stream", 7, "metadata", None, None, None)
ADD = Launch(Adder(), (1,), (Adding(TENSOR, TENSOR), TENSOR, 5), {})


class Call:
    """`x + y + z + summand * (2 or 3 launches)`, by way of temporaries and of views of z; counts how often it runs."""

    def __init__(self, more: Any = lambda: None) -> None:
        self.runs = 0
        self.more = more

    def __call__(self, x: Tensor, y: Tensor | None, z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.runs += 1
        first = torch.empty(SIZE, dtype=torch.int64)
        ADD(first, x, y)
        halves = z[:SIZE], z[SIZE:]
        sums = torch.empty(2, SIZE, dtype=torch.int64)
        for half, its_sum in zip(halves, sums, strict=True):
            ADD(its_sum, first, half)
        self.more()
        out, unused = x.new_empty(SIZE), x.new_empty((2, 3), dtype=torch.float32)
        ADD(out, sums[1], sums[0])
        return out, unused


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """A stream for a machine without a GPU, and nothing written down."""
    active = SimpleNamespace(get_current_stream=lambda device: "stream", launcher_cls=launcher)
    monkeypatch.setattr(direct, "driver", SimpleNamespace(active=active))
    replay.forget()


def tensors(seed: int, y: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """Inputs that share their memory, as views of one projection do, and that views are taken of."""
    generator = torch.Generator().manual_seed(seed)
    x_and_y = torch.randint(10**6, (2, SIZE), generator=generator)
    return x_and_y[0], x_and_y[1] if y else None, torch.randint(10**6, (2 * SIZE,), generator=generator)


def expected(x: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
    return 2 * (x + (0 if y is None else y)) + z[:SIZE] + z[SIZE:] + 25


def play(call: Any, inputs: tuple[Tensor | None, ...], settings: Any = (1, 2.0), caps: Any = (MB, MB)) -> Tensor:
    out, unused = replayed(call, inputs, settings, caps)
    assert (unused.shape, unused.dtype) == ((2, 3), torch.float32)
    return out


@pytest.mark.parametrize("y", [True, False])
def test_other_tensors(y):
    call = Call()
    kept = []
    for seed in range(3):
        inputs = tensors(seed, y)
        kept.append((play(call, inputs), expected(*inputs)))
    assert call.runs == 1
    for out, wanted in kept:
        assert torch.equal(out, wanted)


def test_what_was_written_down_holds_no_tensor():
    """A call may be written down while a CUDA graph is captured, whose memory is another graph's afterwards."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    call, before = Call(), alive()
    play(call, tensors(0))
    assert alive() == before
    assert torch.equal(play(call, tensors(1)), expected(*tensors(1)))
    assert call.runs == 1


def test_what_does_more_than_launch_is_worked_out_every_time():
    call = Call(more=lambda: torch.zeros(3).sort())
    for seed in range(3):
        inputs = tensors(seed)
        assert torch.equal(play(call, inputs), expected(*inputs))
    assert call.runs == 3


def test_kernels_that_were_not_noted_are_not_lost():
    """Such as one that is launched by Triton's own `kernel[grid](...)`."""

    class Doubled(Call):
        def __call__(self, x: Tensor, y: Tensor | None, z: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
            out, unused = super().__call__(x, y, z, *settings)
            twice = torch.empty(SIZE, dtype=torch.int64)
            Adder()[1, 1, 1](Adding(twice, out), out, 0)
            return twice, unused

    call = Doubled()
    for seed in range(3):
        inputs = tensors(seed)
        assert torch.equal(play(call, inputs), 2 * expected(*inputs))
    assert call.runs == 3


def test_launches_of_other_threads_do_not_count():
    def launch_elsewhere() -> None:
        thread = Thread(target=lambda: ADD(*torch.empty(2, SIZE, dtype=torch.int64).unbind(), None))
        thread.start()
        thread.join()

    call = Call(more=launch_elsewhere)
    for seed in range(2):
        inputs = tensors(seed)
        assert torch.equal(play(call, inputs), expected(*inputs))
    assert call.runs == 1


def test_nothing_is_replayed_where_launches_are_not_fixed(monkeypatch):
    monkeypatch.setattr(direct, "_ON", False)
    call = Call()
    for seed in range(2):
        inputs = tensors(seed)
        assert torch.equal(play(call, inputs), expected(*inputs))
    assert call.runs == 2


def test_every_kind_of_call_is_written_down():
    call = Call()
    inputs = tensors(0)
    x, _, z = inputs
    kinds = [
        (inputs, (1, 2.0), (MB, MB)),
        (inputs, (1, 2.5), (MB, MB)),
        (inputs, (1, 2.0), (MB, 2 * MB)),
        ((x, None, z), (1, 2.0), (MB, MB)),
        ((x, torch.zeros(SIZE, 2, dtype=torch.int64).T[0], z), (1, 2.0), (MB, MB)),
        ((x, torch.zeros(SIZE, dtype=torch.float64), z), (1, 2.0), (MB, MB)),
        ((x, torch.zeros(SIZE + 1, dtype=torch.int64), z), (1, 2.0), (MB, MB)),
    ]
    for runs, kind in enumerate(kinds, start=1):
        for _ in range(2):
            play(call, *kind)
            assert call.runs == runs
    other = Call()
    play(other, *kinds[0])
    assert other.runs == 1


def test_temporaries_beyond_the_caps_are_not_held_at_once():
    call = Call()
    for seed in range(3):
        inputs = tensors(seed)
        assert torch.equal(play(call, inputs, caps=(1, 2)), expected(*inputs))
    assert call.runs == 3


def test_unaligned_inputs_are_not_replayed():
    call = Call()
    for _ in range(2):
        x, y, z = tensors(0)
        shifted = torch.cat([x[:1], x])[1:]
        assert shifted.data_ptr() % 16 == 8
        assert torch.equal(play(call, (shifted, y, z)), expected(x, y, z))
    assert call.runs == 2


def test_the_same_tensor_twice_is_not_written_down():
    call = Call()
    for seed in range(2):
        x, _, z = tensors(seed)
        assert torch.equal(play(call, (x, x, z)), expected(x, x, z))
    assert call.runs == 2
    for seed in range(2):
        assert torch.equal(play(call, tensors(seed)), expected(*tensors(seed)))
    assert call.runs == 3


def test_profilers_hear_of_every_launch():
    call = Call()
    inputs = tensors(0)
    play(call, inputs)

    def hook(_):
        pass

    direct.knobs.runtime.launch_enter_hook.add(hook)
    try:
        play(call, inputs)
    finally:
        direct.knobs.runtime.launch_enter_hook.remove(hook)
    assert call.runs == 2


def test_errors_are_raised_and_nothing_is_written_down():
    def refuse() -> None:
        raise ValueError("no")

    call = Call(more=refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            play(call, tensors(0))
    assert call.runs == 2
    call.more = lambda: None
    for seed in range(2):
        assert torch.equal(play(call, tensors(seed)), expected(*tensors(seed)))
    assert call.runs == 3


@pytest.mark.parametrize(
    ("is_cuda", "numbers", "top_k", "expected"),
    [(True, 2**25, 8, "replayed"), (True, 2**25, 9, "worked out"), (False, 8, 8, "worked out")],
)
def test_short_calls_on_a_gpu_are_replayed(monkeypatch, is_cuda, numbers, top_k, expected):
    def work_out(*arguments: Any) -> Any:
        return "worked out", arguments

    def replay_it(function: Any, inputs: Any, settings: Any, caps: Any) -> Any:
        assert caps == (1, 2)
        assert len(settings) == 3, "numbers, and tensors among the inputs"
        return "replayed", function(*inputs, *settings)[1]

    monkeypatch.setattr(attention, "replayed", replay_it)
    monkeypatch.setattr(attention, "workspaces", lambda device: (1, 2))
    q = SimpleNamespace(is_cuda=is_cuda, numel=lambda: numbers, device="cuda:0")
    arguments = (q, "k", "v", Blocking(None, None, 128, top_k), 0.5)
    assert attention._replaying_short_calls(work_out)(*arguments) == (expected, arguments)
