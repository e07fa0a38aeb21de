"""Where Hopper's own kernels serve. They run on such a GPU only (tests/gpu); here they are compiled and chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from openmoba import explain
from openmoba.ops.triton import hopper
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.host.device import most_registers, nvidia_capability

FP16 = torch.float16


def obstacle(q: Tensor, k: Tensor, block_size: int = 128) -> str | None:
    return hopper.why_not(Geometry.of(q, k, None, block_size, 3), q, k, k)


def heads(number: int, width: int = 64, dtype: torch.dtype = FP16) -> Tensor:
    return torch.zeros(1, 1000, number, width, dtype=dtype)


def test_every_obstacle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle(heads(4), heads(2)) == "they need a Hopper GPU and Triton 3.6 to 3.9"
    monkeypatch.setattr(hopper, "is_available", lambda _: True)
    assert obstacle(heads(4), heads(2)) is None
    assert obstacle(heads(4, 128, torch.bfloat16), heads(2, 128, torch.bfloat16), 384) is None
    assert obstacle(heads(4, dtype=torch.float32), heads(2, dtype=torch.float32)) == (
        "they compute in 16 bits, not torch.float32"
    )
    assert obstacle(heads(4, 96), heads(2, 96)) == "head width 96 is not 64 or 128"
    assert obstacle(heads(4), heads(2), 192) == "block_size 192 is no multiple of 128"
    apart = torch.empty(1, dtype=FP16, device="meta").as_strided((1, 1000, 4, 64), (0, 2**24, 64, 1))
    assert obstacle(apart, heads(2)) == "tokens 16777216 elements apart take a block of 128 beyond 2^31"
    rows = torch.zeros(1, 1000, 4 * 64 + 8, dtype=FP16)
    for unaligned in (rows[..., :-8], torch.zeros(1, 1000, 4 * 64 + 16, dtype=FP16)[..., 1:-15]):
        reason = obstacle(unaligned.unflatten(-1, (4, 64)), heads(2))
        assert reason is not None
        assert reason.startswith("strides are no multiples of 16 elements")


def test_one_warning_where_an_untested_triton_keeps_a_gpu_from_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "nvidia_capability", lambda _: (9, 0))
    hopper.is_available.cache_clear()
    assert hopper.is_available(torch.device("cuda:0"))
    monkeypatch.setattr(hopper.triton, "__version__", "3.10.0")
    with pytest.warns(UserWarning, match=r"they need Triton 3.6 to 3.9; with Triton 3.10.0 the portable ones run"):
        assert not hopper.is_available(torch.device("cuda:1"))
    assert not hopper.is_available(torch.device("cuda:1"))  # warnings are errors
    hopper.is_available.cache_clear()


@pytest.mark.parametrize(
    ("hip", "capability", "found"), [(None, (9, 0), (9, 0)), (None, (8, 9), (8, 9)), ("6.4", (9, 0), (0, 0))]
)
def test_capability_is_that_of_nvidia_gpus(
    hip: str | None, capability: tuple[int, int], found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AMD Instinct MI200 calls itself 9.0, too."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert nvidia_capability.__wrapped__(torch.device("cuda:0")) == found
    assert nvidia_capability.__wrapped__(torch.device("cpu")) == (0, 0)


def test_registers_are_held_down_by_nvidias_compiler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_registers(None) == {}
    assert most_registers(128) == {"maxnreg": 128}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert most_registers(128) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what runs without a GPU")
def test_explain_says_which_kernels() -> None:
    q, k = heads(4), heads(2)
    assert explain(q, k, k, block_size=128, top_k=3, impl="triton").reason == (
        "asked for; each query reads at most 3 blocks of 128 keys; portable kernels, not Hopper's own: "
        "they need a Hopper GPU and Triton 3.6 to 3.9"
    )
