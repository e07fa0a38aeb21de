"""The training benchmark: what is measured, rows, resuming, failures, traces, figures. Nothing here asserts a speed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from openmoba.bench.machine import Machine
from openmoba.bench.rows import append_row, read_rows
from openmoba.bench.training import chart, command, longest, loops, measure, watch
from openmoba.bench.training.cases import GRIDS, TrainingCase, TrainingRow
from openmoba.bench.training.chart import rate_chart
from openmoba.bench.training.loops import BareLoop, make_loop, operations
from openmoba.bench.training.profiles import describe, own_kernels, read_profile
from openmoba.bench.training.table import markdown
from openmoba.bench.training.watch import Watch
from openmoba.cli import main
from openmoba.lab.model.build import SIZES
from openmoba.records.figures import RED

CPU = torch.device("cpu")
SMALL = TrainingCase("nano", 2, tokens=48, vocabulary=64, layers="eager")
MOBA = replace(SMALL, block_size=16, top_k=2)


@pytest.fixture(autouse=True)
def _quick(quick_timing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", lambda device, **options: Watch(device, warmup=1, seconds=0.0, **options))


@pytest.fixture(scope="module")
def machine() -> Machine:
    machine = Machine(CPU, "abc")
    machine.rates["float32"] = 0.05
    return machine


def test_every_case_is_a_row_and_is_not_measured_again(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "training.csv"
    cases = [SMALL, MOBA, replace(MOBA, kind="trainer"), replace(SMALL, checkpointing=True)]
    rows = measure.run_training_benchmark(cases, out, machine)
    assert read_rows(out, TrainingRow) == rows
    assert [(row.arm, row.kind, row.checkpointing) for row in rows] == [
        ("full", "loop", False),
        ("16/2", "loop", False),
        ("16/2", "trainer", False),
        ("full", "loop", True),
    ]
    for row in rows:
        assert (row.error, row.samples, row.commit) == (None, watch.FEWEST, "abc")
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.tokens_per_second == pytest.approx(1000 * 2 * 48 / row.p50_ms, rel=1e-4)
        assert row.mfu == pytest.approx(row.tflops / row.matrix_tflops, rel=1e-4)
        assert 0 < row.attention_share < 1
        assert row.transformers
    assert rows[0].loss == pytest.approx(4.16, abs=0.2)  # ln 64
    monkeypatch.setattr(measure, "measure_case", lambda *_: pytest.fail("measured again"))
    assert measure.run_training_benchmark(cases, out, machine) == rows
    assert measure.run_training_benchmark([replace(SMALL, batch=1)], out, machine, minutes=0) == []
    assert len(markdown(rows).splitlines()) == 2 + len(rows)


def test_operations_are_counted_as_the_laboratory_counts_them() -> None:
    loop = make_loop(MOBA, CPU)
    layers, width, vocabulary, tokens = 2, 64, 64, 48
    matrices = sum(p.numel() for p in loop.model.parameters()) - vocabulary * width
    pairs = 3 * (16 * 17 // 2) + 2 * 16 * 16  # own blocks, and one past block of every query after the first block
    # Two blocks to choose from in the last block alone.
    attention = layers * width * (12 * pairs + 2 * 16 * 2)
    expected = 2 * (3 * tokens * (2 * matrices + 2 * vocabulary * width) + attention)
    assert operations(MOBA, loop.model, tokens) == pytest.approx(expected, rel=1e-9)


def test_the_bare_loop_trains_on_tokens_that_differ() -> None:
    loop = BareLoop(MOBA, CPU)
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    Watch(CPU, warmup=1, fewest=3, most=3, profiled=0).run(loop)
    assert all((a != b).any() for a, b in zip(before, loop.model.parameters(), strict=True))
    ids_BT, label_BT = loop.windows["input_ids"], loop.windows["labels"]
    assert ids_BT.shape == (2, 48)
    assert len(ids_BT.unique()) > 32
    assert torch.equal(ids_BT[:, 1:], label_BT[:, :-1])
    assert loop.model.config.moba["block_size"] == 16


def test_layers_are_compiled_where_a_case_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the loss is attached, since that calls the model; the trainer compiles them itself, or says why not."""
    compiled: list[Any] = []
    monkeypatch.setattr(loops, "compile_layers", lambda model: compiled.append(model.forward))
    loop = BareLoop(replace(SMALL, layers="compiled"), CPU)
    assert [forward.__func__ for forward in compiled] == [loop.model.forward.__func__]
    BareLoop(SMALL, CPU)
    assert len(compiled) == 1
    problems = iter([None, "no compiler"])
    monkeypatch.setattr("openmoba.lab.train.trainer.compile_or_stay_eager", lambda *_: next(problems))
    steps = Watch(CPU, warmup=1, fewest=0, most=0, profiled=0)
    steps.run(make_loop(replace(SMALL, layers="compiled", kind="trainer"), CPU))
    with pytest.raises(RuntimeError, match="could not be compiled"):
        steps.run(make_loop(replace(SMALL, layers="compiled", kind="trainer"), CPU))
    steps.run(make_loop(replace(SMALL, kind="trainer"), CPU))


def test_graphed_steps_need_a_gpu_and_a_row_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that was asked for a graph makes no step without one, and a trainer's steps are no graphs unknown."""
    monkeypatch.setattr(loops, "compile_layers", lambda model: None)
    monkeypatch.setattr("openmoba.lab.train.trainer.compile_or_stay_eager", lambda *_: None)
    row = measure.measure_case(replace(MOBA, layers="graphed"), machine, 1.0)
    assert "only GPUs have graphs" in row.error
    row = measure.measure_case(replace(MOBA, layers="graphed", kind="trainer"), machine, 1.0)
    assert "could not be compiled" in row.error  # on a CPU "auto" compiles nothing
    monkeypatch.setattr(loops, "_COMPILE", {"graphed": "layers"})
    row = measure.measure_case(replace(MOBA, layers="graphed", kind="trainer"), machine, 1.0)
    assert "could not be made CUDA graphs" in row.error


def test_a_limit_of_recompilations_is_an_error_and_not_an_eager_row(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(torch.nn.Module):
        """A layer that another graph is needed for at every call."""

        calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x * self.calls

    def recompile(case: TrainingCase, device: torch.device) -> Any:
        layer = Growing()
        layer.compile(backend="eager", dynamic=False)
        return SimpleNamespace(run=lambda watch: [layer(torch.ones(1)) for _ in range(20)], model=None)

    monkeypatch.setattr(measure, "make_loop", recompile)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)  # as transformers' `generate` leaves it
    row = measure.measure_case(replace(SMALL, layers="compiled"), machine, 1.0)
    assert "limit" in row.error
    assert row.p50_ms is None
    assert row.graphs >= 8


def test_failure_is_a_row_and_the_others_go_on(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(case: TrainingCase, device: torch.device) -> Any:
        if case.block_size is None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 60 GiB")
        return BareLoop(case, device)

    monkeypatch.setattr(measure, "make_loop", exhausted)
    full, moba = measure.run_training_benchmark([SMALL, MOBA], tmp_path / "rows.csv", machine)
    assert full.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 60 GiB"
    assert full.p50_ms is None
    assert moba.error is None
    assert "out of memory" in markdown([full])


def test_loss_that_is_no_number_is_no_measurement(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "LEARNING_RATE", float("inf"))
    for kind in ("loop", "trainer"):
        row = measure.measure_case(replace(SMALL, kind=kind), machine, 1.0)
        assert "finite" in row.error or "nan" in row.error


def test_watch_times_steps_after_the_warm_up() -> None:
    made: list[str] = []

    def run(steps: Iterator[None]) -> None:
        for _ in steps:
            made.append("step")

    seen = Watch(CPU, warmup=2, fewest=3, most=5, seconds=60.0, profiled=1)
    seen.run(SimpleNamespace(run=run))
    assert len(made) == 2 + 5 + 1
    assert len(seen.times_ms) == 5
    assert seen.first_ms is not None


@pytest.mark.parametrize("fits", [100, 128, 200, 511, 1024, 70, 17])
@pytest.mark.parametrize("card", [False, True])
def test_longest_window_is_found_to_an_eighth(fits: int, card: bool) -> None:
    tried: list[int] = []

    def attempt(tokens: int) -> Any:
        tried.append(tokens)
        seen = SimpleNamespace(peak_mb=10.0 + 3.0 * tokens)
        return longest.Longest(None, tokens, seen, "out of memory" if tokens > fits else "")

    found = longest._search(64, attempt, lambda best, tokens: False, 10.0 + 3.0 * fits if card else None)
    assert (found.limit, found.tokens % 8) == ("out of memory", 0)
    assert found.tokens <= fits < found.tokens + max(8, found.tokens // 8) + 8
    assert len(tried) == len(set(tried))
    assert len(tried) <= (5 if card else 9)


def test_longest_window_ends_where_a_step_takes_too_long_or_nothing_fits() -> None:
    def attempt(tokens: int) -> Any:
        return longest.Longest(None, tokens, None, "")

    found = longest._search(64, attempt, lambda best, tokens: tokens > 256)
    assert (found.tokens, found.limit) == (256, "time")
    with pytest.raises(ValueError, match="not even 8 tokens fit: out of memory"):
        longest._search(64, lambda tokens: longest.Longest(None, tokens, None, "out of memory"), lambda *_: False)


def test_longest_row_says_what_fits_and_why_no_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = BareLoop.step

    def small_memory(self: BareLoop) -> None:
        if self.windows["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("out of memory")
        step(self)

    monkeypatch.setattr(BareLoop, "step", small_memory)
    case = replace(MOBA, kind="longest", batch=1)
    row = measure.measure_case(case, machine, 60.0)
    assert (row.tokens, row.samples, row.limit) == (96, 1, "OutOfMemoryError: out of memory")
    assert row.tokens_per_second == pytest.approx(1000 * 96 / row.p50_ms, rel=1e-4)
    assert replace(row, tokens=48).key == row.key  # another search would not begin again
    assert measure.measure_case(case, machine, 0.0).limit == "time"


def test_trace_writes_a_file_and_says_what_takes_longest(tmp_path: Path, machine: Machine) -> None:
    path = tmp_path / "new" / "trace.json.gz"
    text = measure.trace(MOBA, machine, path, steps=2)
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"Differentiable", "aten::mm", "aten::_fused_adamw_"} <= names
    assert "aten::mm" in text
    assert text.startswith("a step: ")


def test_profile_of_a_gpu_is_read_by_kernels() -> None:
    def event(name: str, start: float, end: float, kind: DeviceType = DeviceType.CUDA, **more: Any) -> Any:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=bool(more))

    import openmoba.ops.triton.gate  # noqa: F401  whose kernel is known by its name

    events = [
        event("_gate", 0, 1000),
        event("triton_poi_fused_scaled_dot_product_flash_attention_0", 500, 2000),  # fused from anything
        event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 3000, 4000),
        event("Optimizer.step", 0, 9000, annotation=True),
        event("cudaLaunchKernel", 0, 50, DeviceType.CPU),
        event("cudaStreamSynchronize", 0, 700, DeviceType.CPU),
        event("aten::mm", 0, 5000, DeviceType.CPU),
    ]
    assert own_kernels()["_gate"] == "gate"
    seen = read_profile(SimpleNamespace(events=lambda: events))
    assert seen.busy_ms == pytest.approx(3.0)
    assert sum(seen.kernel_ms.values()) == pytest.approx(3.5)
    assert seen.attention_share == pytest.approx(2.0 / 3.5)
    assert seen.attention_kernel in ("_gate", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop")
    assert list(seen.host_ms) == ["cudaStreamSynchronize", "cudaLaunchKernel"]
    text = describe(seen, steps=1, step_ms=4.0)
    assert "3 kernels of 3.50 ms; the GPU is busy 3.00 ms and idle 25% of the step" in text


def test_figure_has_a_line_per_attention_named_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "training.csv"
    for total, size in ((2 * 10**6, "2m"), (14 * 10**6, "14m")):
        for batch, rate in ((1, 1e5), (4, 3e5)):
            for factor, arm in ((1, (None, None)), (3, (512, 3))):
                case = TrainingCase(size, batch, *arm)
                row = TrainingRow.of(case, "bfloat16", total=total, tokens_per_second=factor * rate, device="card")
                append_row(out, replace(row, p50_ms=1.0, tflops=1.0, mfu=0.5))
                append_row(out, replace(row, layers="eager", tokens_per_second=9e9))
    rows = read_rows(out, TrainingRow)
    (axes,) = rate_chart(rows).axes
    assert {text.get_text() for text in axes.texts} == {"full attention\n(SDPA)", "MoBA 512/3"}
    assert {tuple(line.get_ydata()) for line in axes.lines if len(line.get_ydata())} == {(3e5, 3e5), (9e5, 9e5)}
    full = [row for row in rows if row.arm == "full" and row.layers == "compiled"]
    graphs = [replace(row, layers="graphed", tokens_per_second=2e5, attention_kernel="cudnn_sdpa") for row in full[:1]]
    (axes,) = rate_chart([*rows, *graphs]).axes
    assert "full attention\n(SDPA/cuDNN)" in {text.get_text() for text in axes.texts}
    solid, hollow = [line for line in axes.lines if line.get_color() == RED]
    assert list(solid.get_ydata()) == [2e5, 3e5], "graphs first, though others are faster"
    assert (list(hollow.get_ydata()), hollow.get_markerfacecolor()) == ([3e5], "white")
    assert axes.get_title().endswith("layers in CUDA graphs; hollow: compiled alone")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2M", "14M"]
    assert chart._ticks({"17m": 17, "14m": 14, "32m": 32}) == ([14, 17, 32], ["14M", "", "32M"])
    assert main(["bench", "plot", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"training.csv", "training.png", "training.svg"}
    assert "| llama 14m | 4 x 32K | 512/3 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row to draw"):
        rate_chart([replace(rows[0], tokens_per_second=None)])


def test_command_says_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, answer in (
        (["--grid", "none"], "grid must be one of headline, eager"),
        (["--grid", "cpu", "--only", "9m"], "llama tiny 1x2K full compiled loop"),
        (["--grid", "cpu", "--trace", str(tmp_path / "trace.txt")], "must be a .json or .json.gz file"),
    ):
        assert main(["bench", "training", *arguments]) == 2
        assert answer in capsys.readouterr().err
    assert command.Training(grid="headline", only=("14m", "4x32K", "512/3", "llama"))._cases() == [
        TrainingCase("14m", 4, 512, 3)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_grids_of_a_gpu_are_refused_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "training"]) == 2
    assert "use the grid 'cpu'" in capsys.readouterr().err


def test_grids_name_sizes_that_there_are() -> None:
    assert {case.size for cases in GRIDS.values() for case in cases} <= SIZES.keys()
    assert {case.layers for case in GRIDS["cpu"]} == {"compiled", "eager"}, "only GPUs have graphs"


def test_headline_has_the_models_and_arms_that_are_compared() -> None:
    names = [" ".join(case.words) for case in GRIDS["headline"]]
    assert names[:3] == [f"llama 14m 4x32K {arm} compiled loop" for arm in ("full", "512/3", "128/9")]
    assert len(names) == len(set(names)) == 15
