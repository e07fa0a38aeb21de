"""Launches around Triton's look at every argument: same kernel, same arguments; Triton itself for all that is new."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from openmoba.ops.triton.host import direct
from openmoba.ops.triton.host.launch import TENSOR, Launch


class Rows(NamedTuple):
    ptr: Any
    stride: int


class Kernel:
    """Stands for a function of `triton.jit(x, y_ptr, size, SIZE, EVEN)`, x of `Rows`; `log` says who was called how."""

    def __init__(self, compiles: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: Rows, y: Any, size: int, **constants: Any) -> Any:
            assert type(x) is Rows
            self.log.append(("triton", grid, *x, y, size, constants))
            if not self.compiles:
                return None
            signature = {
                "x": Rows("*fp32", "constexpr" if x.stride == 1 else "i32"),
                "y_ptr": "constexpr" if y is None else "*i32",
                "size": "i32",
                "SIZE": "constexpr",
                "EVEN": "constexpr",
            }
            source = SimpleNamespace(signature=signature)
            return SimpleNamespace(src=source, metadata=self, function=7, packed_metadata="metadata")

        return run


def launcher(source: Any, kernel: Kernel) -> Any:
    """Stands for Triton's `launcher_cls`; it is told of what it takes and nothing else."""

    def run(*args: Any) -> None:
        assert len(args) == 9 + len(source.signature)
        kernel.log.append(("direct", *args))

    return run


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    """Stands for the GPU's current stream, and for its launchers."""
    active = SimpleNamespace(get_current_stream=lambda device: ("stream", device), launcher_cls=launcher)
    monkeypatch.setattr(direct, "driver", SimpleNamespace(active=active))


X, Y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
ARGUMENTS = (Rows(TENSOR, 3), TENSOR, 5)
CONSTANTS = {"EVEN": True, "num_warps": 4, "SIZE": 16}


def test_first_by_triton_then_direct_with_what_the_kernel_takes():
    kernel = Kernel()
    run = Launch(kernel, (5,), ARGUMENTS, CONSTANTS)
    run(X, Y)
    run(X, Y)
    assert kernel.log[0] == ("triton", (5, 1, 1), X, 3, Y, 5, CONSTANTS)
    direct = (5, 1, 1, ("stream", -1), 7, "metadata", None, None, None, X.data_ptr(), 3, Y.data_ptr(), 5)
    assert kernel.log[1] == ("direct", *direct)


def test_what_the_kernel_was_compiled_for_is_left_out():
    """A tensor that is absent, and a number that is 1."""
    kernel = Kernel()
    run = Launch(kernel, (5,), (Rows(TENSOR, 1), TENSOR, 5), CONSTANTS)
    run(X, None)
    run(X, None)
    assert kernel.log[1][10:] == (X.data_ptr(), 5)


@pytest.mark.parametrize("other", [(X.double(), Y), (X[1:], Y), (X, None)], ids=["dtype", "alignment", "none"])
def test_other_kinds_of_tensors_go_through_triton(other):
    kernel = Kernel()
    run = Launch(kernel, (5, 2), ARGUMENTS, CONSTANTS)
    for tensors in ((X, Y), other, other, (X, Y)):
        run(*tensors)
    assert [entry[0] for entry in kernel.log] == ["triton", "triton", "direct", "direct"]


def test_every_device_has_its_own_compiled_kernel():
    kernel = Kernel()
    run = Launch(kernel, (5,), ARGUMENTS, CONSTANTS)
    for device in (0, 1, 0, 1):
        x = SimpleNamespace(get_device=lambda device=device: device, data_ptr=lambda: 16, dtype=torch.half)
        run(x, None)
    assert [entry[0] for entry in kernel.log] == ["triton", "triton", "direct", "direct"]
    assert [entry[4] for entry in kernel.log[2:]] == [("stream", 0), ("stream", 1)]


def test_a_tensor_for_each_place():
    """Too many would shift what the kernel takes for numbers."""
    launch = Launch(Kernel(), (1,), (Rows(TENSOR, 3), TENSOR, 4), {})
    x = torch.zeros(4)
    for tensors in ((x,), (x, x, x)):
        with pytest.raises(AssertionError, match="a tensor for each place"):
            launch(*tensors)


def test_what_compiles_nothing_always_goes_through_triton():
    kernel = Kernel(compiles=False)  # Triton's interpreter
    run = Launch(kernel, (5,), ARGUMENTS, CONSTANTS)
    run(X, Y)
    run(X, Y)
    assert [entry[0] for entry in kernel.log] == ["triton", "triton"]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_hear_of_launches(name):
    kernel = Kernel()
    run = Launch(kernel, (5,), ARGUMENTS, CONSTANTS)
    run(X, Y)
    first = run._direct.copy()
    hooks = getattr(direct.knobs.runtime, name)

    def hook(_):
        pass

    hooks.add(hook)
    try:
        run(X, Y)
    finally:
        hooks.remove(hook)
    watched = run._direct.copy()
    run(X, Y)
    assert [entry[0] for entry in kernel.log] == ["triton", "triton", "direct"]
    assert run._direct == watched == first  # what was compiled for the profiler is not kept


def test_untested_versions_of_triton_launch_by_themselves(monkeypatch):
    monkeypatch.setattr(direct, "_ON", False)
    kernel = Kernel()
    run = Launch(kernel, (5,), ARGUMENTS, CONSTANTS)
    run(X, Y)
    run(X, Y)
    assert [entry[0] for entry in kernel.log] == ["triton", "triton"]


@pytest.mark.parametrize(
    ("asked", "version", "fixed"),
    [
        (None, "3.5.1", False),
        (None, "3.6.0", True),
        (None, "3.9.1", True),
        (None, "3.10.0", False),
        ("0", "3.6.0", False),
    ],
)
def test_which_launches_are_fixed(asked, version, fixed):
    assert direct._is_on(asked, version) == fixed


def test_the_setting_is_checked():
    with pytest.raises(ValueError, match="OPENMOBA_FIXED_LAUNCHES must be 0 or 1, got 'off'"):
        direct._is_on("off", "3.6.0")
