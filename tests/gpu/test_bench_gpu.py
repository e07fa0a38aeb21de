"""Benchmarks on a card: events, memory and the contenders that need one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openmoba.bench import paged, timing
from openmoba.bench.attention import run_benchmark
from openmoba.bench.cases import Case
from openmoba.bench.contenders import CONTENDERS
from openmoba.bench.decode import GRAPH, Cache, Shape
from openmoba.bench.training.profiles import own_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASE = Case(2048, 128, 3, heads=8, kv_heads=2)
# What the compiler warns of in its own code is not an error of the contender.
FLEX = pytest.param("flex", marks=pytest.mark.filterwarnings("default"))


@pytest.mark.parametrize("contender", ["sdpa_cudnn", "sdpa_flash", "moba", "given", FLEX])
def test_time_and_memory_of_a_contender(contender: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    (row,) = run_benchmark((CASE,), (contender,), tmp_path / "bench.csv", device=torch.device("cuda"))
    assert row.error is None, row.error
    assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
    output_mb = 2048 * 8 * 128 * 2 / 1e6
    assert output_mb <= row.forward_mb < 20 * output_mb
    assert output_mb <= row.backward_mb < 20 * output_mb  # the gradient of q alone is as large
    assert row.device == torch.cuda.get_device_name()


@pytest.mark.parametrize("contender", ["moba", "given", "sdpa_cudnn", "sdpa_flash", FLEX])
def test_contenders_compute_the_same_function_of_their_kind(contender: str) -> None:
    import openmoba
    from openmoba.bench.inputs import make_inputs

    device = torch.device("cuda")
    inputs = make_inputs(CASE, device)
    top_k = 16 if CONTENDERS[contender].kind == "dense" else CASE.top_k
    settings = {"block_size": CASE.block_size, "top_k": top_k}
    exact = (x.detach().double() for x in (inputs.q, inputs.k, inputs.v))
    selected = openmoba.moba_select(inputs.q, inputs.k, **settings)
    expected = openmoba.moba_attention(*exact, **settings, impl="reference")
    out = CONTENDERS[contender].build(CASE, inputs, selected)()
    differing = ((out.double() - expected).norm(dim=-1) > 0.05 * expected.norm(dim=-1)).double().mean()
    assert differing < 0.01  # queries whose choice in bfloat16 is another


@pytest.mark.parametrize("layers", ["eager", "compiled"])
@pytest.mark.parametrize("arm", [(None, None), (128, 3)])
@pytest.mark.filterwarnings("default")  # of the compiler about its own code
def test_training_row_says_where_the_time_goes(layers: str, arm: tuple[int | None, int | None], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from openmoba.bench.machine import Machine
    from openmoba.bench.training import measure
    from openmoba.bench.training.cases import TrainingCase

    machine = Machine(torch.device("cuda"), "c")
    row = measure.measure_case(TrainingCase("2m", 1, *arm, tokens=4096, layers=layers), machine, 1.0)
    assert row.error is None, row.error
    assert 0 < row.attention_share < 1
    assert 0 < row.busy_ms < 2 * row.p50_ms
    assert (row.attention_kernel in own_kernels()) == (arm[0] is not None), row.attention_kernel
    assert 4 * 4 * row.total / 1e6 < row.peak_mb < 80000  # weights, gradients and two moments in fp32
    assert 0 < row.mfu < 1
    text = measure.trace(TrainingCase("2m", 1, *arm, tokens=4096, layers=layers), machine, tmp_path / "t.json.gz")
    assert "the GPU is busy" in text
    assert "cudaLaunchKernel" in text or "cuLaunchKernel" in text


def test_memory_is_counted_by_pass() -> None:
    """Forward: at most two of three tensors are there at once. Backward: one gradient."""
    x = torch.ones(10**7, device="cuda", requires_grad=True)
    work = timing.Work(lambda: 2 * (x + torch.ones_like(x)), (x,), torch.ones_like(x))
    found = timing.measure(work, torch.device("cuda"))
    tensor_mb, slack_mb = 40, 1.1  # the allocator may hand out a block larger than asked for by a MiB
    assert 2 * tensor_mb <= found.forward_mb <= 2 * (tensor_mb + slack_mb)
    assert tensor_mb <= found.backward_mb <= tensor_mb + slack_mb


@pytest.mark.parametrize("page_size", [16, 128, 512])
def test_a_graph_over_pages_is_timed_at_its_work(page_size: int) -> None:
    """Replayed after other tensors took what was free, it gives what a contiguous cache gives."""
    shape = Shape(4096, 2, heads=8, kv_heads=2)
    cache = Cache(shape, torch.device("cuda"))
    replay = paged._call(page_size, None, cache, shape.row("moba", GRAPH, (128, 4)))
    taken = [torch.full((size,), 2**30, dtype=torch.int32, device="cuda") for size in (16, 64, 256, 1024, 2**14) * 50]
    expected = cache.moba(128, 4)()[:, 0]
    for _ in range(3):
        assert (replay().double() - expected.double()).norm() <= 2**-7 * expected.double().norm()
    del taken
