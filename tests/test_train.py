"""Training runs: same start and data in all arms, killed and resumed, switched, fine-tuned, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Notes, curve
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from openmoba.lab.measure.compute import Shape
from openmoba.lab.measure.evaluate import evaluate_source
from openmoba.lab.model.build import SIZES, build_model, load_model
from openmoba.lab.model.checkpoint import damage, newest_checkpoint
from openmoba.lab.train import callback
from openmoba.lab.train import trainer as trainer_module
from openmoba.lab.train.history import evaluations, history, read_result
from openmoba.lab.train.plan import planned_shape
from openmoba.lab.train.run import run_training
from openmoba.lab.train.schedule import learning_rate_factor
from openmoba.lab.train.summary import parameters
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk
from openmoba.records.locks import claim

TRAIN = TrainConfig(steps=12, batch_size=4, log_every=2, checkpoint_every=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 12 steps on texts that a small model learns something about."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts").mkdir()
    for n in range(8):
        (root / "texts" / f"{n}.txt").write_text("".join(f"{i} times {n} is {i * n}, " for i in range(40)))
    return RunConfig(
        data=DataConfig(str(root / "texts"), hold_out=4, tokenizer="bytes", length=64, cache=str(root / "cache")),
        model=ModelConfig(size="nano"),
        arm=ArmConfig("moba", block_size=8, top_k=2),
        train=TRAIN,
        eval=EvalConfig(windows=4, every=6, trailing=16, position_range=16),
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, trained without interruption."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_training(config, folder)
    return folder


def test_a_run_leaves_its_records(config: RunConfig, finished: Path) -> None:
    rows = history(finished)
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert train[-1]["tokens"] == 12 * 4 * 64 == config.tokens
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert set(train[0]) >= {"kind", "step", "tokens", "loss", "lr", "seconds", "tokens_per_second", "mfu", "compute"}
    assert set(train[0]["compute"]) == {"accelerator_seconds"}, "the others follow from the step"
    assert set(evaluations[0]["compute"]) == {"6nd", "chinchilla", "causal_exact", "accelerator_seconds"}
    assert 0 < train[-1]["compute"]["accelerator_seconds"] < train[-1]["seconds"]
    assert [part["end"] for part in evaluations[0]["position_loss"]] == [16, 32, 48, 64]
    assert not {"windows", "intervals"} & set(evaluations[0])
    windows = evaluations[-1].pop("windows")
    assert {name: len(values) for name, values in windows.items()} == dict.fromkeys(windows, 4)
    assert set(windows) == {"document", "lm", "trailing", "positions"}
    assert [len(ranges) for ranges in windows["positions"]] == [4] * 4
    assert sum(windows["lm"]) / 4 == pytest.approx(evaluations[-1]["lm_loss"], rel=1e-5)
    result = disk.read_json(finished / "result.json")
    assert result["eval"] == {name: evaluations[-1][name] for name in ("step", "lm_loss", "trailing_loss")}
    assert result["config"] == to_dict(config) == disk.read_json(finished / "config.json")
    assert (result["arm"], result["size"], result["seed"]) == ("moba", "nano", 0)
    assert result["params"]["total"] > result["params"]["non_embedding"] > 0
    assert set(result) >= {"tokens", "compute", "versions", "hardware", "commit", "seconds"}


def test_records_carry_the_speed_of_their_own_steps(finished: Path) -> None:
    rows = [row for row in disk.read(finished / "metrics.jsonl") if row["kind"] == "train"]
    for before, row in pairwise([{"compute": {"accelerator_seconds": 0.0}}, *rows]):
        seconds = row["compute"]["accelerator_seconds"] - before["compute"]["accelerator_seconds"]
        assert row["tokens_per_second"] == pytest.approx(2 * 4 * 64 / seconds, rel=1e-3)
        assert row["mfu"] is None, "nobody states the peak of this CPU"
    speed = disk.read_json(finished / "result.json")["speed"]
    found = sorted(row["tokens_per_second"] for row in rows)
    assert speed == {"tokens_per_second": pytest.approx((found[2] + found[3]) / 2), "mfu": None, "peak": None}


def test_checkpoints_hold_safetensors_and_nothing_pickled_that_runs_code(finished: Path) -> None:
    (checkpoint,) = finished.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-12"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "optimizer.pt", "complete.json"} <= names
    assert "training_args.bin" not in names
    torch.load(checkpoint / "optimizer.pt", weights_only=True)


def test_what_an_evaluation_found_in_every_window_is_read_back(finished: Path) -> None:
    measured = evaluate_source(str(finished))
    *_, recorded = evaluations(finished, *read_result(finished))
    assert recorded["windows"] == measured["windows"]
    assert recorded["intervals"]["lm"] == pytest.approx(measured["intervals"]["lm"], rel=5e-6)
    assert recorded["lm_loss"] == float(f"{measured['lm_loss']:.6g}") != measured["lm_loss"]


def test_a_finished_run_is_not_trained_again(
    config: RunConfig, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunTrainer, "train", None)
    assert run_training(config, finished) == disk.read_json(finished / "result.json")


def test_another_configuration_in_the_same_folder_is_refused(config: RunConfig, finished: Path) -> None:
    other = replace(config, train=replace(TRAIN, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"holds another run: train\.learning_rate was 0\.005 and is 0\.001"):
        run_training(other, finished)


def test_a_run_keeps_its_sharding(config: RunConfig, finished: Path) -> None:
    other = replace(config, train=replace(TRAIN, fsdp=True))
    with pytest.raises(
        ValueError, match=r"began with train\.fsdp=False and keeps it.* got True; go on as it began, or"
    ):
        run_training(other, finished)


def test_a_killed_run_goes_on_with_the_same_records(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    """Killed twice: once somewhere after the first checkpoint, once in the middle of writing one."""
    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(config))
    command = [sys.executable, "-m", "openmoba", "train", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()) as process:
        deadline = time.monotonic() + 120
        while newest_checkpoint(folder) is None and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "result.json").exists()
    resumed_from = newest_checkpoint(folder)
    assert resumed_from is not None

    unfinished = folder / "checkpoint-10"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"torn")
    dropped = {"kind": "train", "step": 11, "loss": 0.0, "seconds": 0.0, "compute": {"accelerator_seconds": 0.0}}
    disk.append(folder / "metrics.jsonl", dropped)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra')
    run_training(config, folder)
    assert curve(folder) == curve(finished)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-12"]


KILLED = """
import os, signal, sys
from openmoba import cli
from openmoba.lab.train import trainer
plain, calls = trainer.{name}, []
def killed(*args, **kwargs):
    found = plain(*args, **kwargs)
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
trainer.{name} = killed
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("name", "call", "last"),
    [
        ("measure", 1, ("train", 6)),  # in the middle of an evaluation
        ("record", 4, ("eval", 6)),  # after its record, before the next checkpoint
        ("measure", 2, ("train", 12)),
        ("record", 8, ("eval", 12)),  # before the last checkpoint
        ("seal", 3, ("eval", 12)),  # before the result
    ],
)
def test_a_run_killed_around_an_evaluation_has_every_record_once(
    config: RunConfig, finished: Path, tmp_path: Path, name: str, call: int, last: tuple[str, int]
) -> None:
    disk.write_json(tmp_path / "config.json", to_dict(config))
    code = KILLED.format(name=name, call=call)
    command = [sys.executable, "-c", code, "train", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, env=_environment())
    assert done.returncode == -signal.SIGKILL, done.stderr
    row = disk.read(tmp_path / "metrics.jsonl")[-1]
    assert (row["kind"], row["step"]) == last
    assert not (tmp_path / "result.json").exists()
    run_training(config, tmp_path)
    assert curve(tmp_path) == curve(finished)
    spent = [row["compute"]["accelerator_seconds"] for row in disk.read(tmp_path / "metrics.jsonl")]
    assert spent == sorted(spent)


def test_a_run_killed_between_its_last_checkpoint_and_its_result_only_writes_that(
    config: RunConfig, tmp_path: Path, finished: Path
) -> None:
    run_training(config, tmp_path)
    expected = curve(tmp_path)
    (tmp_path / "result.json").unlink()
    result = run_training(config, tmp_path)
    assert curve(tmp_path) == expected == curve(finished)
    assert result["eval"]["step"] == 12


def test_arms_start_from_the_same_weights_and_see_the_same_windows(config: RunConfig, tmp_path: Path) -> None:
    """With blocks enough to read everything, MoBA is full attention: then the curves agree."""
    one = replace(config, train=replace(TRAIN, steps=4))
    arms = {"full": ArmConfig("full"), "moba": ArmConfig("moba", 8, 8), "sparse": ArmConfig("moba", 8, 2)}
    rows = {}
    for name, arm in arms.items():
        run_training(replace(one, arm=arm), tmp_path / name)
        rows[name] = [row["loss"] for row in curve(tmp_path / name) if row["kind"] == "train"]
    assert rows["moba"] == pytest.approx(rows["full"], rel=1e-5)
    assert rows["sparse"] != pytest.approx(rows["full"], rel=1e-5)


def test_a_time_hybrid_switches_and_can_be_killed_across_the_switch(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = replace(config, arm=ArmConfig("time_hybrid", 8, 2, switch_at=0.5))
    seen = []
    plain = RunTrainer.attend_as_configured

    def spy(trainer: RunTrainer, step: int) -> None:
        plain(trainer, step)
        seen.append((step, trainer.model.config.moba))

    monkeypatch.setattr(RunTrainer, "attend_as_configured", spy)
    run_training(timed, tmp_path / "whole")
    assert [step for step, attention in seen if attention is None] == list(range(6, 12))

    monkeypatch.setattr(RunTrainer, "attend_as_configured", plain)
    for stop in (5, 9):  # checkpoints at 4 and 8: before and after the switch
        _interrupt(timed, tmp_path / "cut", stop, monkeypatch)
    run_training(timed, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    saved = disk.read_json(tmp_path / "cut" / "checkpoint-12" / "config.json")
    assert saved.get("moba") is None


def test_a_warm_start_trains_as_full_attention_and_goes_on_as_moba(config: RunConfig, tmp_path: Path) -> None:
    arms = {"full": ArmConfig("full"), "warm": ArmConfig("moba", 8, 2, warm_start=0.5)}
    losses = {}
    for name, arm in arms.items():
        run_training(replace(config, arm=arm), tmp_path / name)
        losses[name] = [row["loss"] for row in curve(tmp_path / name) if row["kind"] == "train"]
    half = len(losses["full"]) // 2
    assert losses["warm"][:half] == losses["full"][:half]
    assert losses["warm"][half:] != losses["full"][half:]
    assert disk.read_json(tmp_path / "warm" / "checkpoint-12" / "config.json")["moba"]["block_size"] == 8


def test_evaluations_evenly_spaced_in_log_compute_are_the_same_after_a_kill(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = replace(config, eval=replace(config.eval, every=None, count=5))
    assert spaced.evaluation_steps == (1, 2, 3, 6, 12)
    run_training(spaced, tmp_path / "whole")
    assert [row["step"] for row in curve(tmp_path / "whole") if row["kind"] == "eval"] == [1, 2, 3, 6, 12]
    _interrupt(spaced, tmp_path / "cut", 7, monkeypatch)
    run_training(spaced, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_accumulated_micro_batches_train_as_one_batch(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    run_training(replace(config, train=replace(TRAIN, micro_batch_size=1)), tmp_path / "run")
    losses = [[row["loss"] for row in curve(f) if row["kind"] == "train"] for f in (finished, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_fine_tuning_starts_from_a_run_and_learns_the_last_tokens(
    config: RunConfig, finished: Path, tmp_path: Path
) -> None:
    settings = replace(TRAIN, start_from=str(finished), loss_tokens=16, steps=4, learning_rate=1e-6, warmup=0.0)
    tuning = replace(config, data=replace(config.data, tokenizer="auto"), arm=ArmConfig("full"), train=settings)
    run_training(tuning, tmp_path / "tuned")
    first = next(row for row in curve(tmp_path / "tuned") if row["kind"] == "train")
    fresh = next(row for row in curve(finished) if row["kind"] == "train")
    assert first["loss"] < fresh["loss"] - 0.5


def test_a_run_of_a_model_from_elsewhere_is_planned_and_named_as_that_model(
    config: RunConfig, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights,) = finished.glob("checkpoint-*")
    model = shutil.copytree(weights, tmp_path / "my-model")
    entries = disk.read_json(model / "config.json")
    shape = Shape.of(load_model(model), 64)
    said = f"that of {model}, {parameters(shape)}"
    assert cli.main(["train", str(tmp_path / "run"), "--dry-run", "--train.start-from", str(model)]) == 0
    assert f"{said}, vocabulary {entries['vocab_size']:,}" in capsys.readouterr().out
    heard = _Heard()
    run_training(replace(config, train=replace(TRAIN, start_from=str(model))), tmp_path / "run", progress=heard)
    assert any(said in note for note in heard.notes)
    assert disk.read_json(tmp_path / "run" / "result.json")["size"] == "my-model"
    assert cli.main(["runs", str(tmp_path / "run")]) == 0
    assert "my-model" in capsys.readouterr().out.splitlines()[1].split()
    other = shutil.copytree(finished, tmp_path / "deeper")
    stored = disk.read_json(other / "config.json")
    stored["model"]["overrides"]["num_hidden_layers"] = 3
    disk.write_json(other / "config.json", stored)
    assert planned_shape(replace(config, train=replace(TRAIN, start_from=str(other)))).layers == 3


def test_a_run_that_starts_from_another_says_the_same_model(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    other = replace(config, model=ModelConfig(size="micro"), train=replace(TRAIN, start_from=str(finished)))
    with pytest.raises(
        ValueError, match=r"is a run of model\.family=llama model\.size=nano, this one says llama micro"
    ):
        run_training(other, tmp_path)
    longer = replace(config, data=replace(config.data, length=65), train=replace(TRAIN, start_from=str(finished)))
    with pytest.raises(ValueError, match=r"data\.length=65 exceeds the 64 positions of the model"):
        run_training(longer, tmp_path / "longer")


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"tensorboard": True}])
def test_options_of_memory_precision_and_logs_change_the_curve_by_rounding_at_most(
    config: RunConfig, finished: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_training(replace(config, train=replace(TRAIN, **changes)), tmp_path)
    losses = [[row["loss"] for row in curve(f) if row["kind"] == "train"] for f in (finished, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "precision" in changes else 1e-5)
    assert bool(list(tmp_path.rglob("events.out.tfevents*"))) == ("tensorboard" in changes)


@pytest.mark.parametrize(("arm", "loss_tokens"), [("full", None), ("hybrid", None), ("moba", 16)])
def test_a_step_between_two_records_asks_the_device_for_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Any, loss_tokens: int | None
) -> None:
    """No number is read back, and no shape depends on values: on a GPU each would hold up the host."""
    asked: list[tuple[int, str]] = []
    now = -1

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"):
                asked.append((now, func.overloadpacket.__name__))
            return func(*args, **(kwargs or {}))

    plain = RunTrainer.attend_as_configured

    def spy(trainer: RunTrainer, step: int) -> None:
        nonlocal now
        now = step
        plain(trainer, step)

    monkeypatch.setattr(RunTrainer, "attend_as_configured", spy)
    load = trainer_module._stack
    monkeypatch.setattr(trainer_module, "_stack", lambda windows: _outside(load, windows))  # is on the host anyway
    settings = replace(TRAIN, steps=7, log_every=3, checkpoint_every=6, loss_tokens=loss_tokens)
    quiet = replace(config, arm=ArmConfig(arm, 8, 2), train=settings, eval=replace(config.eval, every=None))
    with Watch():
        run_training(quiet, tmp_path)
    assert {step for step, _ in asked} & set(range(7)) == {2, 5, 6}, asked


def test_chat_is_fine_tuned_through_the_template(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2 times 3?"}, {"role": "assistant", "content": "6"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [*chat, *chat[:n]]}) + "\n" for n in (0, 1, 2)) * 1)
    data = replace(config.data, source=str(path), column="messages", tokenizer="auto", hold_out=2)
    settings = replace(TRAIN, start_from=str(finished), steps=2)
    result = run_training(
        replace(config, data=data, train=settings, eval=replace(config.eval, windows=1)), tmp_path / "chat"
    )
    assert result["eval"]["lm_loss"] > 0
    masked = replace(config, data=data, train=replace(settings, loss_tokens=1), eval=replace(config.eval, windows=1))
    with pytest.raises(ValueError, match=r"loss_tokens=1: \d of \d training windows .*leave train\.loss_tokens out"):
        run_training(masked, tmp_path / "masked")


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RunTrainer.attend_as_configured

    def poison(trainer: RunTrainer, step: int) -> None:
        plain(trainer, step)
        if step == 6:
            with torch.no_grad():
                trainer.model.get_input_embeddings().weight.fill_(torch.nan)

    monkeypatch.setattr(RunTrainer, "attend_as_configured", poison)
    with pytest.raises(
        ValueError, match=r"not a finite number at step 7, nothing later is saved; lower train\.learning"
    ):
        run_training(config, tmp_path)
    assert [row["step"] for row in curve(tmp_path) if row["kind"] == "train"] == [2, 4, 6]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_damaged_checkpoint_is_passed_over_or_named(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    _interrupt(config, folder, 9, monkeypatch)
    newest = newest_checkpoint(folder)
    assert newest == folder / "checkpoint-8"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors has 100 bytes" in (damage(newest) or "")
    assert newest_checkpoint(folder) == folder / "checkpoint-4"
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no usable checkpoint .*optimizer\.pt is missing.*delete the folder"):
        run_training(config, folder)


def test_a_disk_that_is_full_stops_the_run_with_earlier_records_whole(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync
    calls = 0

    def full(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(28, "No space left on device")
        plain(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device"):
        run_training(config, tmp_path)
    monkeypatch.setattr(os, "fsync", plain)
    assert [row["step"] for row in disk.read(tmp_path / "metrics.jsonl")][:1] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(size="huge")}, r"unknown model\.size 'huge'; the sizes are nano, micro"),
        ({"model": ModelConfig(family="lama")}, r"unknown model\.family 'lama'"),
        ({"model": ModelConfig(size="nano", overrides={"num_heads": 3})}, "configuration has no num_heads"),
        (
            {"model": ModelConfig(size="nano", overrides={"hidden_size": 63})},
            r"do not fit a llama model.*\(63\) is not a mul",
        ),
        ({"train": replace(TRAIN, checkpoint_every=5)}, r"checkpoint_every=5 must be a multiple of train\.log_every=2"),
        ({"eval": replace(EvalConfig(), trailing=70)}, r"eval\.trailing=70 is more than a window of data\.length=64"),
        ({"train": replace(TRAIN, micro_batch_size=3)}, r"batch_size=4 does not divide into 1 device"),
        ({"train": replace(TRAIN, start_from="/nowhere/model")}, "/nowhere/model"),
        ({"train": replace(TRAIN, fsdp=True)}, r"train\.fsdp needs GPUs"),
        ({"arm": ArmConfig("hybrid", 8, 2, full_layers=9)}, "full_layers=9 exceeds the model's 2 layers"),
    ],
)
def test_bad_runs_are_refused_before_training(
    config: RunConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(replace(config, **changes), tmp_path)
    assert not (tmp_path / "config.json").exists(), "a start that failed decides nothing for the next"
    assert disk.read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("arm", ["full", "moba"])
def test_attention_dropout_is_refused_before_data_are_read(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """Of a fresh model and of one to start from; the attention function would refuse it in the first step."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("data are read")

    monkeypatch.setattr("openmoba.lab.train.run.load_data", read)
    model = ModelConfig(size="nano", overrides={"attention_dropout": 0.1})
    dropping = replace(config, model=model, arm=ArmConfig(arm, 8, 2))  # type: ignore[arg-type]
    for start in (None, str(finished)):
        with pytest.raises(ValueError, match=r"attention_dropout=0\.1 drops .* set it to 0 in model\.overrides"):
            run_training(replace(dropping, train=replace(TRAIN, start_from=start)), tmp_path)


def test_schedules_warm_up_hold_and_decay() -> None:
    cosine = TrainConfig(warmup=0.1, final_learning_rate=0.1)
    assert [learning_rate_factor(s, 100, cosine) for s in (0, 10, 55, 100)] == pytest.approx([1 / 11, 1, 0.55, 0.1])
    wsd = TrainConfig(schedule="wsd", warmup=0.1, decay=0.2, final_learning_rate=0.0)
    assert [learning_rate_factor(s, 100, wsd) for s in (5, 10, 80, 90, 100)] == pytest.approx([6 / 11, 1, 1, 0.5, 0])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [build_model(ModelConfig(size="nano"), 257, 64, seed) for seed in (0, 0, 1)]
    weights = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert list(SIZES)[:3] == ["nano", "micro", "tiny"]


def test_two_processes_train_as_one(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    """Data parallel over gloo: the same records as one process, up to the order of sums."""
    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "openmoba", "train", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in curve(f) if row["kind"] == "train"] for f in (finished, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    windows = [[row["windows"]["lm"] for row in curve(f) if "windows" in row] for f in (finished, folder)]
    assert windows[0][0] == pytest.approx(windows[1][0], rel=1e-2)


def test_commands(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(finished)]) == 0
    assert "LM loss" in capsys.readouterr().out
    assert cli.main(["evaluate", str(finished), "--eval.windows", "2", "--out", str(tmp_path / "row.json")]) == 0
    assert "last 16" in capsys.readouterr().out
    assert cli.main(["evaluate", str(finished)]) == 0
    assert (
        f"last 16  {disk.read_json(finished / 'result.json')['eval']['trailing_loss']:.4f}" in capsys.readouterr().out
    )
    assert len(disk.read_json(tmp_path / "row.json")["windows"]["lm"]) == 2
    assert cli.main(["evaluate", str(tmp_path), "--data.source", str(tmp_path / "no.txt")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == cli.main(["tarin"]) == 2
    assert "unknown command 'tarin'" in capsys.readouterr().err


class _Heard(Notes):
    """Keeps steps too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def step(self, done: int, total: int, detail: str = "", share: float | None = None) -> None:
        if share is not None:  # of training, not of reading data
            self.steps.append(f"{done}/{total} {detail} {share:.2f}")


def test_a_run_says_what_it_is_and_how_it_goes(config: RunConfig, tmp_path: Path) -> None:
    heard = _Heard()
    hybrid = replace(config, arm=ArmConfig("hybrid", 8, 2, full_layers=1))
    run_training(hybrid, tmp_path / "run", progress=heard)
    summary = next(note for note in heard.notes if note.startswith(str(tmp_path)))
    for said in (
        r"model +llama nano, 1\d\d K parameters \(101 K without embeddings\)",
        r"attention +MoBA, blocks of 8, top-2, 1 of 2 layers full \(1\): 68% of full attention's keys; cpu \(",
        r"data .*texts: \d+ windows of 64 tokens, 4 held out, vocabulary 25\d",
        r"training +12 steps of 256 tokens in 4 windows: 3,072 tokens, [\d.]+ epochs",
        r"device .*, \d+ threads?, fp32",
        r"records .*run/metrics\.jsonl every 2 steps, 2 evaluations, checkpoint every 4",
    ):
        assert re.search(said, summary), (said, summary)
    evaluations = [row for row in disk.read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"]
    for row in evaluations:
        told = f"step {row['step']}: held-out loss {row['lm_loss']:.4f}, last 16 tokens {row['trailing_loss']:.4f}"
        assert told in heard.notes
    assert re.fullmatch(r"2/12 loss \d\.\d+  lr 0\.00\d+  [\d,]+ tokens/s 0\.17", heard.steps[0]), heard.steps


def test_progress_is_told_between_two_records_too(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "SECONDS_PER_LINE", 0.0)
    heard = _Heard()
    run_training(replace(config, train=replace(TRAIN, steps=4)), tmp_path / "run", progress=heard)
    assert [step.split("/")[0] for step in heard.steps] == ["1", "2", "3", "4"]


def test_a_dry_run_says_what_would_be_and_touches_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tmp_path / "run"), "--dry-run", "--data.source", str(tmp_path / "no such file")]
    size = ["--model.size", "14m", "--arm.name", "full", "--data.length", "4096", "--train.steps", "100"]
    assert cli.main([*command, *size]) == 0
    out = capsys.readouterr().out
    for said in (
        r"llama 14m, 14\.9 M parameters \(14\.2 M without embeddings\), vocabulary 2,048",
        r"attention +full attention",
        r"100 steps of 4 windows of 4,096 tokens: 1,638,400 tokens; 32 windows evaluated 1 time\n",
        r"6nd 1\.61e-06, chinchilla \S+, causal_exact \S+ PFLOP/s-days",
        r"about \S+ GB on one device",
        r"time +about .* on this machine, if training reaches 30% of the \S+ TFLOP/s",
    ):
        assert re.search(said, out), (said, out)
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--model.size", "15n"]) == 2
    assert cli.main(["train", str(finished), "--dry-run", "--train.learning-rate", "1"]) == 2
    assert "holds another run: train.learning_rate" in capsys.readouterr().err


def test_runs_are_listed_side_by_side(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cut = replace(config, arm=ArmConfig("full"))
    _interrupt(cut, tmp_path / "study" / "cut", 9, monkeypatch)
    _interrupt(replace(cut, eval=replace(cut.eval, windows=3)), tmp_path / "study" / "other", 7, monkeypatch)
    (tmp_path / "study" / "broken").mkdir()
    (tmp_path / "study" / "broken" / "metrics.jsonl").write_text("{\n")
    assert cli.main(["runs", str(finished), str(tmp_path / "study")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:8] == ["run", "state", "arm", "size", "tokens", "LM", "trailing", "to"]
    cells = {Path(line.split()[0]).name: line.split()[1:] for line in lines[:-1]}
    losses = {}
    for folder in (finished, tmp_path / "study" / "cut"):
        rows = disk.read(folder / "metrics.jsonl")
        losses[folder] = next(row["trailing_loss"] for row in reversed(rows) if row["kind"] == "eval")
    first, second = sorted(losses)
    assert cells["run"][:4] == ["finished", "moba", "8/2", "nano"]
    assert cells["cut"][:4] == ["step", "8/12", "full", "nano"]
    assert cells["run"][-5] == f"{losses[finished]:.4f}"
    assert cells[first.name][-4] == "+0.0000"
    assert cells[second.name][-4] == f"{losses[second] - losses[first]:+.4f}"
    assert cells["other"][-4] == "+0.0000", "on other windows"
    assert lines[-1].startswith(f"not listed: {tmp_path / 'study' / 'broken'}: ")
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", str(tmp_path / "empty")]) == 2
    assert "there are no runs below" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "study" / "broken")]) == 2
    assert "not listed: " in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_record_is_listed(config: RunConfig, tmp_path: Path, capsys: Any) -> None:
    tmp_path.joinpath("run").mkdir()
    disk.write_json(tmp_path / "run" / "failed.json", {"reason": "no number", "config": to_dict(config)})
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["failed", "moba", "8/2"]


def test_what_diverged_in_fp32_is_not_advised_to_use_it(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower train\.learning_rate=1e\+30 or lower train\.clip=1\.0$"):
        run_training(replace(config, train=replace(TRAIN, learning_rate=1e30)), tmp_path)


def test_a_run_is_converted_without_its_training_state(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    command = ["convert", str(finished), str(out), "--block-size", "16", "--top-k", "2", "--full-layers", "spread:1"]
    assert cli.main(command) == 0
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {path.name for path in out.iterdir()}
    state = {
        "trainer_state.json",
        "complete.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    }
    assert not state & {path.name for path in out.iterdir()}
    assert load_model(out).config.moba == {"block_size": 16, "top_k": 2, "full_layers": "spread:1"}


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert out.startswith(f"openmoba {project['version']}, python ")
    assert f"torch {torch.__version__}" in out


def test_options_left_out_are_those_of_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And an option that says the default is not one that was left out."""
    assert cli.main(["evaluate", str(finished), "--data.length", "32", "--eval.trailing", "8"]) == 0
    assert "last 8" in capsys.readouterr().out  # on the run's documents, which have other tokens than the default's
    assert cli.main(["train", str(finished), "--train.steps", str(TrainConfig().steps)]) == 2
    assert f"train.steps was 12 and is {TrainConfig().steps}" in capsys.readouterr().err
    # Fits what is stored, not the default of log_every:
    assert cli.main(["train", str(finished), "--train.checkpoint-every", "4"]) == 0


def test_overrides_are_any_value_and_kept_by_the_run(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tmp_path)]
    data = ["--data.source", config.data.source, "--data.cache", config.data.cache, "--data.hold-out", "4"]
    small = ["--data.tokenizer", "bytes", "--data.length", "64", "--train.steps", "2", "--eval.windows", "4"]
    model = ["--model.family", "mistral", "--model.size", "nano"]
    given = ["--model.overrides", "sliding_window", "None", "tie_word_embeddings", "False"]
    for arguments in ([*data, *small, *model, *given], given, []):
        assert cli.main([*command, *arguments]) == 0
    stored = disk.read_json(tmp_path / "config.json")["model"]["overrides"]
    assert stored == {"sliding_window": None, "tie_word_embeddings": False}
    assert cli.main([*command, "--model.overrides", "sliding_window", "3"]) == 2
    assert "holds another run: model.overrides was" in capsys.readouterr().err


def test_options_that_cannot_work_are_refused_before_the_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for command in ("evaluate", "evaluate needle"):
        assert cli.main([*command.split(), str(finished), "--out", str(tmp_path / "file" / "x.json")]) == 2
        out, error = capsys.readouterr()
        assert "cannot write into the folder of --out" in error
        assert out == ""


def test_a_run_that_never_began_gives_way(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(replace(config, model=ModelConfig(size="7b"))))
    run_training(config, folder)
    assert curve(folder) == curve(finished)


def test_one_process_trains_a_run(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk.write_json(tmp_path / "config.json", to_dict(config))
    with claim(tmp_path):
        assert cli.main(["train", str(tmp_path)]) == 2
    assert f"is being trained by process {os.getpid()} on" in capsys.readouterr().err


def _interrupt(config: RunConfig, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until `step` has begun, then stop as a kill would: nothing is cleaned up."""
    plain = RunTrainer.attend_as_configured

    def stop(trainer: RunTrainer, at: int) -> None:
        if at == step:
            raise KeyboardInterrupt
        plain(trainer, at)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "attend_as_configured", stop)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, folder)


def _outside(function: Any, *arguments: Any) -> Any:
    """Call without the dispatch mode that is on."""
    with _disable_current_modes():
        return function(*arguments)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
