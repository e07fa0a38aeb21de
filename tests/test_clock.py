"""Speed, its share of the peak, the time left of a study, and what runs will be."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_study import RECIPE, train

from openmoba.bench.rows import read_rows
from openmoba.bench.training.cases import TrainingRow
from openmoba.hf.releases import recompute_activations
from openmoba.lab.arms import ArmConfig
from openmoba.lab.columns import gigabytes
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, from_dict
from openmoba.lab.measure.compute import PFLOPS_DAY, Shape, attention_flops, training_compute
from openmoba.lab.model.build import build_model, set_attention
from openmoba.lab.model.loss import attach_loss
from openmoba.lab.progress import Progress, duration
from openmoba.lab.study.overview import overview
from openmoba.lab.study.recipe import parse_recipe
from openmoba.lab.study.work import StudyClock, run_study
from openmoba.lab.train.clock import PEAKS, Clock, Speedometer, median_speed, peak_operations
from openmoba.lab.train.plan import SHARE, activation_bytes, matrix_rate, plan_of, planned_shape, planned_work
from openmoba.records.disk import read_json

RESULTS = Path(__file__).parents[1] / "results" / "h200"
RUN = RunConfig(
    data=DataConfig(length=4096, vocab_size=300),
    model=ModelConfig(size="nano"),
    arm=ArmConfig("full", 64, 3),
    train=TrainConfig(steps=100, batch_size=2),
    eval=EvalConfig(windows=10),
)


def test_mfu_by_hand() -> None:
    """3000 tokens of 2e9 operations each in 2 seconds are 3e12 a second, a tenth of the peak."""
    meter = Speedometer(peak=3e13)
    meter.start(1000, 5.0, 1e12 / PFLOPS_DAY)
    assert meter.read(4000, 7.0, 7e12 / PFLOPS_DAY) == {"tokens_per_second": 1500, "mfu": 0.1}
    assert meter.read(5000, 8.0, 7.3e12 / PFLOPS_DAY) == {"tokens_per_second": 1000, "mfu": 0.01}
    assert Speedometer(peak=None).read(10, 1.0, 1.0) == {"tokens_per_second": 10, "mfu": None}


def test_time_of_earlier_attempts_is_added_as_it_was_whatever_the_devices_are_now() -> None:
    """7 seconds of one device, then 3 of two."""
    clock = Clock(torch.device("cpu"), devices=2)
    clock.go_on(seconds=100.0, accelerator_seconds=7.0)
    clock.tick()
    begun, clock.trained = clock.trained, 3.0
    assert clock.accelerator_seconds == 13.0
    assert 0 < begun < clock.seconds - 100.0 < 60.0


def test_the_peak_is_stated_for_known_devices_in_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peak_operations(cuda, True, 2) == 2 * 989e12 == 2 * PEAKS["NVIDIA H200"]
    assert peak_operations(cuda, False, 2) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 NVL")  # which has another peak
    assert peak_operations(cuda, True, 1) is None
    assert peak_operations(torch.device("cpu"), True, 1) is None


def test_the_speed_of_a_run_is_its_median_and_older_records_have_none() -> None:
    rows = [{"tokens_per_second": speed, "mfu": None} for speed in (1.0, 90.0, 100.0)]
    assert median_speed(rows, None) == {"tokens_per_second": 90.0, "mfu": None, "peak": None}
    assert median_speed([{"loss": 1.0}], 9e14) == {"tokens_per_second": None, "mfu": None, "peak": 9e14}


def test_work_counts_the_attention_as_it_is() -> None:
    shape = planned_shape(RUN)
    assert shape == Shape.of(build_model(RUN.model, 300, 64, 0), 4096)
    moba = replace(RUN, arm=replace(RUN.arm, name="moba"))
    saved = attention_flops(shape, None) - attention_flops(shape, moba.arm.attention(0, 100))
    forward = 1 + 10 / (100 * 2) / 3  # one evaluation of 10 windows beside 200 of training
    assert planned_work(RUN) - planned_work(moba) == pytest.approx(200 * saved * forward)
    hybrid = replace(RUN, arm=replace(RUN.arm, name="hybrid"))
    assert planned_work(moba) < planned_work(hybrid) < planned_work(RUN)
    often = replace(RUN, eval=EvalConfig(windows=10, count=20))
    assert planned_work(often) / planned_work(RUN) == pytest.approx((1 + 200 / 200 / 3) / forward)


def test_the_time_left_of_a_study_counts_the_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MoBA is cheaper: after it, more than half of the time of both arms is left."""
    recipe = parse_recipe(
        """
        [run]
        data = { length = 8192 }
        train = { steps = 100 }
        [sizes]
        nano = { model = { size = "nano" } }
        [arms]
        moba = { name = "moba", block_size = 64, top_k = 2 }
        full = { name = "full" }
        [[stages]]
        name = "one"
        sizes = ["nano"]
        arms = ["moba", "full"]
        """,
        title="study",
    )
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = StudyClock(recipe, tmp_path)
    clock.left(recipe.runs[0], 0.0)
    now = 100.0
    first, second = (planned_work(run.config(tmp_path)) for run in recipe.runs)
    assert second > 2 * first
    left = duration(100 * second / first)
    assert clock.left(recipe.runs[0], 1.0) == f"study {first / (first + second):.0%}, {left} left"


def test_time_hybrids_have_more_than_a_tenth_of_the_work_in_their_last_tenth() -> None:
    arm = ArmConfig("time_hybrid", 64, 2)
    parts = [training_compute(planned_shape(RUN), arm, step, 100, 1, 0.0)["causal_exact"] for step in (90, 100)]
    assert parts[0] / parts[1] < 0.85


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("family", "shared"), [("llama", 2), ("llama", 1), ("qwen3", 2)])
def test_planned_activations_are_those_that_a_forward_pass_keeps(family: str, shared: int, bf16: bool) -> None:
    config = RunConfig(
        data=DataConfig(length=512, vocab_size=2048),
        model=ModelConfig(family, "nano", {"num_key_value_heads": shared}),
        arm=ArmConfig("moba", 64, 3),
        train=TrainConfig(batch_size=2, precision="bf16" if bf16 else "fp32"),
    )
    assert _kept(config) == pytest.approx(activation_bytes(config), rel=0.02)
    checkpointed = replace(config, train=replace(config.train, gradient_checkpointing=True, micro_batch_size=1))
    one = replace(config, train=replace(config.train, micro_batch_size=1))
    layer = activation_bytes(one) - activation_bytes(checkpointed)  # nano has two
    assert _kept(checkpointed) < activation_bytes(checkpointed) < _kept(checkpointed) + 1.5 * layer


def test_planned_activations_follow_the_feed_forward_whatever_a_family_calls_it() -> None:
    narrow, wide = (
        activation_bytes(RunConfig(model=ModelConfig("opt", "nano", {"ffn_dim": width}))) for width in (176, 1760)
    )
    assert wide > 1.5 * narrow


@pytest.mark.parametrize(("count", "text"), [(6.5e8, "0.65 GB"), (3.76e10, "38 GB"), (1.13e12, "1,100 GB")])
def test_memory_is_written_without_exponents(count: float, text: str) -> None:
    assert gigabytes(count) == text


def _as_timed(row: TrainingRow) -> RunConfig:
    """A thousand steps of what a row of `bench training` timed."""
    return RunConfig(
        DataConfig(length=row.tokens, vocab_size=row.vocabulary),
        ModelConfig(row.family, row.size),
        ArmConfig.of(row.block_size, row.top_k, row.full_layers, row.key_conv),
        TrainConfig(steps=1000, batch_size=row.batch),
        EvalConfig(1),
    )


def test_plans_foretell_the_measured_steps_of_a_gpu() -> None:
    """What the GPU is busy for in rows of `bench training`, and runs of the study that the host kept up with: 25 %."""
    rows = [row for row in read_rows(RESULTS / "training.csv", TrainingRow) if row.kind == "loop" and row.mfu]
    matrices = 1e12 * statistics.median(row.matrix_tflops for row in rows)
    found = {}
    for row in rows:
        config = _as_timed(row)
        seconds = planned_work(config, "cuda") / SHARE["cuda"] / matrices
        found[f"{row.family} {row.size} {row.batch} {config.arm}"] = seconds / row.busy_ms, row.non_embedding
    for file in (RESULTS / "study").rglob("result.json"):
        result = read_json(file)
        config = from_dict(RunConfig, result["config"])
        if config.arm.name != "full" and not result.get("graphed"):
            continue  # one window a step, and the host launched its kernels one by one
        if not result["compiled"]:
            continue  # plans are of compiled layers
        seconds = planned_work(replace(config, eval=EvalConfig(1)), "cuda") / SHARE["cuda"] / matrices
        found[str(file)] = seconds * result["speed"]["tokens_per_second"] / config.tokens, 0
    assert len(found) > 15
    for name, (ratio, parameters) in found.items():
        assert 0.8 < ratio < (1.25 if parameters < 1e8 else 1.6), (name, ratio)


def test_compiled_layers_took_two_thirds_of_the_planned_memory_of_eager_ones() -> None:
    """As docs/speed.md says of the rows that it shows, MoBA and full attention alike."""
    rows = [row for row in read_rows(RESULTS / "training.csv", TrainingRow) if row.kind == "loop" and row.peak_mb]
    for row in rows:
        assert row.peak_mb * 1e6 / plan_of(_as_timed(row), "cuda").memory == pytest.approx(2 / 3, abs=0.08), row
    assert len(rows) >= 15


def test_plans_name_parameters_compute_and_memory() -> None:
    plan = plan_of(RUN)
    assert plan.shape.non_embedding == 100_672
    assert plan.compute["6nd"] * PFLOPS_DAY == pytest.approx(6 * 100_672 * 100 * 2 * 4096)
    assert set(plan.compute) == {"6nd", "chinchilla", "causal_exact"}
    assert plan.memory > 16 * plan.shape.total + plan.activations
    assert matrix_rate(bf16=False) > 1e8


def test_a_dry_run_of_a_study_tells_what_is_left(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, title="study")
    run_study(recipe, tmp_path / "half", _half, lambda _: Progress())
    for folder in ("none", "half"):
        head, *lines, total = overview(recipe, tmp_path / folder).splitlines()
        assert head.split() == ["run", "parameters", "tokens", "6nd", "chinchilla", "causal_exact", "memory", "time"]
        assert len(lines) == len(recipe.runs)
        words = lines[0].split()
        assert words[:2] == ["missing" if folder == "none" else "finished", "pretrain/small-full-seed0"]
        assert words[2:4] == ["6.33", "M"], "without embeddings"
        assert "compute in PFLOP/s-days: 6nd " in total
    assert "at 30% of the" in overview(recipe, tmp_path / "none")
    assert "22 runs, 0 to be finished in about 0s of one process, at the speed of the 22 finished ones" in total
    *lines, total = overview(recipe.chosen(["*/medium-*"]), tmp_path / "none", tflops=700.0).splitlines()
    assert len(lines) == 1 + 4
    assert "4 runs, 4 to be finished in about" in total
    assert "at 55% of 700 TFLOP/s" in total


def _half(config: RunConfig, folder: Path, **options: Any) -> Any:
    return train(config, folder)


def _kept(config: RunConfig) -> int:
    """Bytes that autograd keeps of a forward pass, but for the weights."""
    tokens = config.train.micro_batch_size or config.train.batch_size
    model = build_model(config.model, 2048, 512, 0)
    set_attention(model, config.arm.attention(0, 10))
    attach_loss(model)
    if config.train.gradient_checkpointing:
        recompute_activations(model)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(2048, (tokens, 512))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"),
    ):
        model.train()(ids, ids, torch.tensor(ids.numel()), slice(None))
    return sum(storage.nbytes() for storage in kept.values())
