"""What the attention benchmark times, and how."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_rows import CPU, SMALL
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import openmoba
from openmoba.bench import attention, cases, contenders, timing
from openmoba.bench.attention import run_benchmark
from openmoba.bench.cases import Case
from openmoba.bench.flex import TILE, choice_mask, flex_call
from openmoba.bench.inputs import first_block_share, make_inputs
from openmoba.ops.reference import attention_mask

pytestmark = pytest.mark.usefixtures("quick_timing")


def test_contenders_that_cannot_run_here_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_benchmark((SMALL,), ("flex", "fa4"), tmp_path / "bench.csv", device=CPU) == []
    assert "left out: flex (runs on cuda)" in capsys.readouterr().err
    assert contenders.CONTENDERS["flash_moba"].missing(torch.device("cuda")) == "flash_moba is not installed"
    assert contenders.CONTENDERS["fa4"].missing(torch.device("cuda")) == "flash_attn.cute is not installed"


def test_quadratic_contenders_stop_at_256k_and_those_who_are_given_a_choice_come_last() -> None:
    long = replace(SMALL, tokens=2**20)
    tasks = list(attention._tasks([long, SMALL], ["sdpa", "moba", "given", "flex"]))
    first = [("moba", long), ("sdpa", SMALL), ("moba", SMALL)]
    assert tasks == [*first, ("given", long), ("given", SMALL), ("flex", SMALL)]


def test_given_blocks_are_timed_on_mobas_choice(tmp_path: Path) -> None:
    inputs = make_inputs(SMALL, CPU)
    selected = openmoba.moba_select(inputs.q, inputs.k, block_size=SMALL.block_size, top_k=SMALL.top_k)
    moba, given = (contenders.CONTENDERS[name].build(SMALL, inputs, selected)() for name in ("moba", "given"))
    torch.testing.assert_close(given, moba)
    (row,) = run_benchmark((SMALL,), ("given",), tmp_path / "bench.csv", device=CPU)
    assert row.error is None
    assert row.first_block_share is not None


def test_attention_with_mobas_mask_is_mobas() -> None:
    case = replace(SMALL, tokens=100)
    inputs = make_inputs(case, CPU)
    selected = openmoba.moba_select(inputs.q, inputs.k, block_size=case.block_size, top_k=case.top_k)
    masked, moba = (contenders.CONTENDERS[name].build(case, inputs, selected)() for name in ("sdpa_mask", "moba"))
    torch.testing.assert_close(masked, moba, rtol=1e-4, atol=1e-5)


def test_flash_attention_4_is_called_as_its_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flash_attn.cute.flash_attn_func(q, k, v, causal=...)` of `[batch, tokens, heads, width]`, heads grouped."""

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    module = ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    inputs = make_inputs(SMALL, CPU)
    found, expected = (contenders.CONTENDERS[name].build(SMALL, inputs, None)() for name in ("fa4", "sdpa"))
    torch.testing.assert_close(found, expected)


def test_mask_given_to_flex_attention_is_the_choice() -> None:
    case = Case(5 * TILE, 2 * TILE, 2, head_dim=8, batch=2, heads=2, kv_heads=1, dtype="float32", passes="forward")
    inputs = make_inputs(case, CPU)
    random_BTHR = openmoba.moba_select(inputs.q, inputs.k, block_size=case.block_size, top_k=case.top_k)
    first_BTHR = random_BTHR.clamp(max=0)  # all choose block 0, so that tiles stay unread
    for selected_BTHR in (random_BTHR, first_BTHR):
        mask = choice_mask(case, selected_BTHR)
        reads_BHTT = attention_mask(selected_BTHR, case.tokens, case.block_size)
        assert torch.equal(create_mask(mask.mask_mod, 2, 2, case.tokens, case.tokens, device="cpu"), reads_BHTT)
        read_tiles_BHQN = reads_BHTT.view(2, 2, 5, TILE, 5, TILE).any(5).any(3)
        assert torch.equal(mask.to_dense().bool(), read_tiles_BHQN)
    assert read_tiles_BHQN[0, 0, 4].tolist() == [True, True, False, False, True]


def test_flex_attention_reads_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4 * TILE, TILE, 2, head_dim=16, batch=2, heads=4, kv_heads=2, dtype="float32", passes="forward")
    inputs = make_inputs(case, CPU)
    settings = {"block_size": case.block_size, "top_k": case.top_k}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    out = flex_call(case, inputs, openmoba.moba_select(inputs.q, inputs.k, **settings))()
    expected = openmoba.moba_attention(inputs.q, inputs.k, inputs.v, **settings, impl="reference")
    torch.testing.assert_close(out, expected)


def test_flex_attention_needs_whole_tiles() -> None:
    with pytest.raises(ValueError, match="block_size=16 is not a multiple"):
        choice_mask(replace(SMALL, tokens=TILE), torch.zeros(1, TILE, 4, 2, dtype=torch.int32))


def test_operations_are_those_of_the_pairs_in_the_mask() -> None:
    inputs = make_inputs(replace(SMALL, heads=1, kv_heads=1), CPU)
    selected = openmoba.moba_select(inputs.q, inputs.k, block_size=16, top_k=3)
    pairs = int(attention_mask(selected, 96, 16).sum())
    case = replace(SMALL, heads=1, kv_heads=1)
    assert case.operations(dense=False, scores=False) == 14 * pairs * 8
    assert replace(case, passes="forward").operations(dense=False, scores=False) == 4 * pairs * 8
    assert case.operations(dense=True, scores=False) == 14 * (96 * 97 // 2) * 8
    scores = 16 * (3 + 4 + 5)
    assert case.operations(dense=False, scores=True) == (14 * pairs + 2 * scores) * 8


@pytest.mark.parametrize("width", [64, 128])
def test_skewed_routing_draws_half_of_the_queries_to_one_block(width: int) -> None:
    case = Case(4096, 32, 3, head_dim=width, heads=2, kv_heads=1, dtype="float32", passes="forward")
    share = {}
    for routing in cases.ROUTINGS:
        inputs = make_inputs(replace(case, routing=routing), CPU)
        share[routing] = first_block_share(openmoba.moba_select(inputs.q, inputs.k, block_size=32, top_k=3))
    assert share["random"] < 0.15
    assert 0.5 < share["skewed"] < 0.6


def test_not_finite_results_are_no_measurement() -> None:
    with pytest.raises(ArithmeticError, match="NaN"):
        timing.measure(timing.Work(lambda: torch.tensor([0.0, torch.nan])), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="the system says how much memory a process takes")
def test_memory_on_a_cpu_is_that_of_each_pass() -> None:
    """2**22 floats are 16.8 MB: one tensor forward, and backward the gradient of the output's copy."""
    x = torch.zeros(2**22, requires_grad=True)
    found = timing.measure(timing.Work(lambda: 2 * x, (x,), torch.ones(2**22)), CPU)
    assert found.forward_mb == pytest.approx(16.8, abs=4)
    assert found.backward_mb == pytest.approx(16.8, abs=4)


def test_collecting_garbage_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too: it happens before the first timed call, which decides how many there are."""
    now = 0.0

    def passing(seconds: float) -> Callable[[], Tensor]:
        def pass_by() -> Tensor:
            nonlocal now
            now += seconds
            return torch.zeros(3)

        return pass_by

    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(timing.gc, "collect", passing(1000.0))
    monkeypatch.setattr(timing, "SECONDS", 0.5)
    monkeypatch.setattr(timing, "_event_times", timing._wall_times)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    for device in (CPU, torch.device("cuda")):
        found = timing.measure(timing.Work(passing(2**-6)), device)
        assert found.samples == 2**5 > timing.FEWEST
        assert (found.p20_ms, found.p80_ms) == (1000 * 2**-6, 1000 * 2**-6)


def test_gradients_are_part_of_the_timed_call() -> None:
    x = torch.ones(3, requires_grad=True)
    phases: list[str] = []
    results = timing.Work(lambda: 2 * x, (x,), torch.full((3,), 5.0)).run(lambda: phases.append("forward done"))
    assert [result.tolist() for result in results] == [[2.0] * 3, [10.0] * 3]
    assert phases == ["forward done"]
    (out,) = timing.Work(lambda: 2 * x).run()
    assert not out.requires_grad
