"""The steps of a run: the same start and windows in all arms, and what must not change them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import curve, one_thread
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import default_collate

from openmoba.hf import configure
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import ModelConfig, RunConfig, TrainConfig, to_dict
from openmoba.lab.data.load import load_data
from openmoba.lab.data.windows import TrainingWindows
from openmoba.lab.model.build import SIZES, build_model, load_model, model_folder
from openmoba.lab.model.loss import attach_loss
from openmoba.lab.train import trainer as trainer_module
from openmoba.lab.train.run import run_training
from openmoba.lab.train.schedule import learning_rate_factor
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [build_model(ModelConfig(size="nano"), 257, 64, seed) for seed in (0, 0, 1)]
    weights = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert list(SIZES)[:3] == ["nano", "micro", "tiny"]


def test_schedules_warm_up_hold_and_decay() -> None:
    cosine = TrainConfig(warmup=0.1, final_learning_rate=0.1)
    assert [learning_rate_factor(s, 100, cosine) for s in (0, 10, 40, 100)] == pytest.approx([1 / 11, 1, 0.775, 0.1])
    wsd = TrainConfig(schedule="wsd", warmup=0.1, decay=0.2, final_learning_rate=0.0)
    assert [learning_rate_factor(s, 100, wsd) for s in (5, 10, 80, 90, 100)] == pytest.approx([6 / 11, 1, 1, 0.5, 0])


def test_arms_start_from_the_same_weights_and_see_the_same_windows(config: RunConfig, tmp_path: Path) -> None:
    """With blocks enough to read everything, MoBA is full attention: then the curves agree."""
    one = replace(config, train=replace(config.train, steps=4))
    arms = {"full": ArmConfig("full"), "moba": ArmConfig("moba", 8, 8), "sparse": ArmConfig("moba", 8, 2)}
    rows = {}
    for name, arm in arms.items():
        run_training(replace(one, arm=arm), tmp_path / name)
        rows[name] = [row["loss"] for row in curve(tmp_path / name) if row["kind"] == "train"]
    assert rows["moba"] == pytest.approx(rows["full"], rel=1e-5)
    assert rows["sparse"] != pytest.approx(rows["full"], rel=1e-5)


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


def test_accumulated_micro_batches_train_as_one_batch(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    run_training(replace(config, train=replace(config.train, micro_batch_size=1)), tmp_path / "run")
    losses = [[row["loss"] for row in curve(f) if row["kind"] == "train"] for f in (finished, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"tensorboard": True}])
def test_options_of_memory_precision_and_logs_change_the_curve_by_rounding_at_most(
    config: RunConfig, finished: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_training(replace(config, train=replace(config.train, **changes)), tmp_path)
    losses = [[row["loss"] for row in curve(f) if row["kind"] == "train"] for f in (finished, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "precision" in changes else 1e-5)
    assert bool(list(tmp_path.rglob("events.out.tfevents*"))) == ("tensorboard" in changes)


def test_two_processes_train_as_one(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    """Data parallel over gloo: the same records as one process, up to the order of sums."""
    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "openmoba", "train", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=one_thread())
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in curve(f) if row["kind"] == "train"] for f in (finished, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    windows = [[row["windows"]["lm"] for row in curve(f) if "windows" in row] for f in (finished, folder)]
    assert windows[0][0] == pytest.approx(windows[1][0], rel=1e-2)


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
    settings = replace(config.train, steps=7, log_every=3, checkpoint_every=6, loss_tokens=loss_tokens)
    quiet = replace(config, arm=ArmConfig(arm, 8, 2), train=settings, eval=replace(config.eval, every=None))
    with Watch():
        run_training(quiet, tmp_path)
    assert {step for step, _ in asked} & set(range(7)) == {2, 5, 6}, asked


def _outside(function: Any, *arguments: Any) -> Any:
    """Call without the dispatch mode that is on."""
    with _disable_current_modes():
        return function(*arguments)


def test_fine_tuning_starts_from_a_run_and_learns_the_last_tokens(
    config: RunConfig, finished: Path, tmp_path: Path
) -> None:
    """The first two steps are of the windows that the seed says, and hardly change the weights."""
    settings = replace(config.train, start_from=str(finished), loss_tokens=16, steps=4, learning_rate=1e-6, seed=3)
    tuning = replace(config, data=replace(config.data, tokenizer="auto"), arm=ArmConfig("full"), train=settings)
    run_training(tuning, tmp_path / "tuned")
    first = next(row for row in curve(tmp_path / "tuned") if row["kind"] == "train")
    with model_folder(finished) as folder:
        model, data = load_model(folder), load_data(tuning.data, start_from=folder)
    attach_loss(configure(model, None))
    order = TrainingWindows(data.train, 8, 3, 16)
    windows = default_collate([order[i] for i in range(8)])
    with torch.no_grad():
        loss = model(windows["input_ids"], windows["labels"]).sum() / (8 * 16)
    assert first["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_chat_is_fine_tuned_through_the_template(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2 times 3?"}, {"role": "assistant", "content": "6"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [*chat, *chat[:n]]}) + "\n" for n in (0, 1, 2)) * 1)
    data = replace(config.data, source=str(path), column="messages", tokenizer="auto", hold_out=2)
    settings = replace(config.train, start_from=str(finished), steps=2)
    result = run_training(
        replace(config, data=data, train=settings, eval=replace(config.eval, windows=1)), tmp_path / "chat"
    )
    assert result["eval"]["lm_loss"] > 0
    masked = replace(config, data=data, train=replace(settings, loss_tokens=1), eval=replace(config.eval, windows=1))
    with pytest.raises(ValueError, match=r"loss_tokens=1: \d of \d training windows .*leave train\.loss_tokens out"):
        run_training(masked, tmp_path / "masked")
