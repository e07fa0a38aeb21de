"""Runs that go on: nothing is missing, nothing sticks from a failed start, longer only where no step would change."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import EvalConfig, RunConfig, TrainConfig, stored_config
from openmoba.lab.data import load as data_module
from openmoba.lab.errors import DivergenceError, Terminated
from openmoba.lab.measure.evaluate import evaluate_source
from openmoba.lab.measure.generate import generate_text
from openmoba.lab.measure.needle import measure_needles
from openmoba.lab.model.checkpoint import checkpoints, damage, newest_checkpoint, newest_held, prune, seal
from openmoba.lab.progress import Progress
from openmoba.lab.train import run as train_module
from openmoba.lab.train.clock import Clock
from openmoba.lab.train.history import evaluations, history, history_until, read_result
from openmoba.lab.train.run import run_training
from openmoba.lab.train.schedule import check_lengthening
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk
from openmoba.records.locks import lock


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def config(root: Path) -> RunConfig:
    return tiny_config(root)


@pytest.fixture(scope="module")
def trained(config: RunConfig, root: Path) -> Path:
    """That run, finished, with its checkpoints of steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "prune", lambda *_, **__: None)
        run_training(config, root / "run")
    return root / "run"


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def cut(finished: Path) -> Path:
    """The same without its result."""
    (finished / "result.json").unlink()
    return finished


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    return said


def drop(folder: Path, kind: str, step: int) -> None:
    rows = disk.read(folder / "metrics.jsonl")
    disk.keep(folder / "metrics.jsonl", [row for row in rows if (row["kind"], row["step"]) != (kind, step)])


@pytest.mark.parametrize(("kind", "step"), [("train", 2), ("train", 4), ("eval", 4)])
def test_a_run_does_not_go_on_over_a_lost_record(config: RunConfig, cut: Path, kind: str, step: int) -> None:
    drop(cut, kind, step)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl lacks the .* of step {step}, though .* is at step 4; rest"):
        run_training(config, cut)


def test_a_record_twice_is_named(config: RunConfig, cut: Path) -> None:
    disk.append(cut / "metrics.jsonl", disk.read(cut / "metrics.jsonl")[0])
    with pytest.raises(ValueError, match=r"record of training of step 2 comes after that of step 4"):
        run_training(config, cut)


def test_a_result_without_its_evaluation_is_not_drawn(finished: Path) -> None:
    config, result = read_result(finished)
    assert [row["step"] for row in evaluations(finished, config, result)] == [4]
    rows = disk.read(finished / "metrics.jsonl")
    disk.keep(finished / "metrics.jsonl", [row | {"lm_loss": 5.0} if row["kind"] == "eval" else row for row in rows])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: the evaluation of step 4 says lm_loss=5\.0, .*result\.json"):
        evaluations(finished, config, result)
    disk.keep(finished / "metrics.jsonl", rows[:-1])
    with pytest.raises(ValueError, match=r"metrics\.jsonl lacks the evaluation of step 4, though .*result\.json is of"):
        evaluations(finished, config, result)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 2 has no 'kind'"),
        ('{"kind": "eval", "step": 4}', "line 2 has no 'lm_loss'"),
        ('{"kind": "train", "step": "4"}', "line 2: step is not int but '4'"),
        ('{"kind": "other", "step": 4}', "line 2: unknown kind 'other'"),
        ('{"kind": "train", "step": 4, "loss": 1, "seconds": 1, "compute": []}', r"compute is not a table but \[\]"),
    ],
)
def test_records_that_are_none_are_named(config: RunConfig, finished: Path, line: str, message: str) -> None:
    first = (finished / "metrics.jsonl").read_text().splitlines()[0]
    (finished / "metrics.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        history_until(finished, config, 4)


def test_a_result_that_is_none_is_named(finished: Path) -> None:
    for content, message in (("{}", "has no 'config'"), ('{"config": {"model": 3}}', "has no 'params'")):
        (finished / "result.json").write_text(content)
        with pytest.raises(ValueError, match=rf"result\.json {message}"):
            read_result(finished)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "tokenizer.json"])
def test_corruption_of_the_same_size_falls_back_to_the_older_checkpoint(cut: Path, notes: list[str], name: str) -> None:
    flip_a_byte(cut / "checkpoint-4" / name)
    assert newest_checkpoint(cut, Progress()) == cut / "checkpoint-2"
    assert notes == [f"{cut / 'checkpoint-4'} is not used: {name} is not what was written (its hash differs)"]
    assert damage(cut / "checkpoint-4", contents=False) is None


def test_whoever_measures_a_damaged_run_is_told(cut: Path, notes: list[str]) -> None:
    flip_a_byte(cut / "checkpoint-4" / "model.safetensors")
    evaluate_source(str(cut), progress=Progress())
    assert f"{cut / 'checkpoint-4'} is not used" in notes[0]


def test_a_damaged_run_goes_on_from_the_older_checkpoint(config: RunConfig, cut: Path, trained: Path) -> None:
    flip_a_byte(cut / "checkpoint-4" / "optimizer.pt")
    run_training(config, cut)
    lost, kept = ([row["loss"] for row in disk.read(f / "metrics.jsonl") if "loss" in row] for f in (cut, trained))
    assert lost == kept


def test_tied_weights_of_a_checkpoint_are_not_said_to_be_missing(
    config: RunConfig, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *_: said.append(text))
    shutil.rmtree(cut / "checkpoint-4")
    run_training(config, cut)
    assert "lm_head.weight" not in load_file(cut / "checkpoint-4" / "model.safetensors")
    assert not [text for text in said if "missing keys" in text]


def test_a_seal_without_hashes_is_one_of_an_older_run(cut: Path) -> None:
    seal_file = cut / "checkpoint-4" / "complete.json"
    disk.write_json(seal_file, {"files": disk.read_json(seal_file)["files"]})
    assert newest_checkpoint(cut) == cut / "checkpoint-4"
    seal_file.write_text('{"files": 3}')
    assert newest_checkpoint(cut) == cut / "checkpoint-2"


def test_weights_that_are_no_numbers_are_one_error(finished: Path) -> None:
    weights = finished / "checkpoint-4" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    seal(finished / "checkpoint-4")
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity.*use an earlier checkpoint"):
        evaluate_source(str(finished))
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        measure_needles([finished], lengths=(32,), depths=1, samples=1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        generate_text(finished, "2 times", max_new_tokens=2)


def test_a_checkpoint_that_is_read_is_not_pruned(cut: Path) -> None:
    shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-6")
    with newest_held(cut) as held:
        assert held == cut / "checkpoint-6"
        shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-8")  # as training goes on
        prune(cut, keep=1)
        assert checkpoints(cut) == [cut / "checkpoint-8", held]
    prune(cut, keep=1)
    assert checkpoints(cut) == [cut / "checkpoint-8"]


def test_a_checkpoint_that_was_pruned_meanwhile_is_not_missed(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = damage

    def late(checkpoint: Path) -> str | None:
        if checkpoint.name == "checkpoint-4" and checkpoint.exists():
            checkpoint.rename(cut / "checkpoint-6")  # the reader has listed it, and it is there no more
        return plain(checkpoint)

    monkeypatch.setattr("openmoba.lab.model.checkpoint.damage", late)
    assert newest_checkpoint(cut) == cut / "checkpoint-2", "an older one that is whole will do"
    shutil.rmtree(cut / "checkpoint-2")
    (cut / "checkpoint-6").rename(cut / "checkpoint-4")
    assert newest_checkpoint(cut) == cut / "checkpoint-6"


def test_a_start_that_fails_leaves_no_settings(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RunTrainer, "training_step", fail)
    with pytest.raises(RuntimeError):
        run_training(config, tmp_path / "run")
    assert list((tmp_path / "run").glob("*.json")) == []
    given = tmp_path / "run" / "config.json"
    given.write_text("{}")
    with pytest.raises(RuntimeError):
        run_training(config, tmp_path / "run")
    assert given.read_text() == "{}", "what was there before stays"


def test_leftovers_of_a_killed_writer_are_removed(config: RunConfig, finished: Path) -> None:
    left, other = finished / ".config.json.999999999", finished / f".result.json.{os.getpid()}"
    for path in (left, other, finished / ".hidden", finished / ".5"):
        path.write_text("{")
    run_training(config, finished)
    assert not left.exists()
    assert other.exists(), "its writer lives"
    assert (finished / ".hidden").exists()
    assert (finished / ".5").exists()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"size": "huge"}, r"unknown model\.size 'huge'"),
        ("model", {"family": "lama"}, r"unknown model\.family 'lama'"),
        ("arm", {"name": "hybrid", "full_layers": 9}, r"full_layers=9 exceeds the model's 2 layers"),
        ("train", {"micro_batch_size": 3}, r"train\.batch_size=2 does not divide"),
        ("train", {"fsdp": True}, r"train\.fsdp needs GPUs"),
        ("train", {"start_from": "/nowhere/model"}, "/nowhere/model"),
    ],
)
def test_settings_are_checked_before_the_data_are_read(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(train_module, "load_data", None)
    wrong = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(ValueError, match=message):
        run_training(wrong, tmp_path / "run")


def test_a_model_to_start_from_is_checked_before_the_data_are_read(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "load_data", None)
    start = replace(config, train=replace(config.train, start_from=str(finished)))
    with pytest.raises(ValueError, match=r"data\.length=40 exceeds the 32 positions"):
        run_training(replace(start, data=replace(start.data, length=40)), tmp_path / "new")
    with pytest.raises(ValueError, match=r"full_layers=9 exceeds"):
        run_training(replace(start, arm=ArmConfig("hybrid", full_layers=9)), tmp_path / "new")


def test_a_gradient_that_is_no_number_is_divergence(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunTrainer, "_clip_grad_norm", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(DivergenceError, match=r"the gradient was not a finite number at step 2.*lower train\.learning"):
        run_training(config, tmp_path / "run")
    assert disk.read(tmp_path / "run" / "metrics.jsonl") == []


def test_a_run_that_diverges_keeps_its_settings(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first record, too: the bare command is about that run, and options change its settings."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_clip_grad_norm", lambda *_: torch.tensor(torch.nan))
        with pytest.raises(DivergenceError):
            run_training(config, folder)
        assert cli.main(["train", str(folder)]) == 2
    assert "the gradient was not a finite number at step 2" in capsys.readouterr().err
    assert stored_config(folder) == config
    assert cli.main(["runs", str(folder)]) == 0
    assert "failed" in capsys.readouterr().out
    assert cli.main(["train", str(folder), "--train.learning-rate", "1e-4"]) == 0
    assert stored_config(folder) == replace(config, train=replace(config.train, learning_rate=1e-4))
    assert not (folder / "failed.json").exists()


def test_a_stopped_run_goes_on_from_its_time_to_the_last_digit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 3, between the records of 2 and 4: what the third step took is neither rounded nor lost."""
    config, third = tiny_config(root, log_every=2), 1e6 / 3
    monkeypatch.setattr(Clock, "tick", lambda self: setattr(self, "trained", self.trained + third))
    with monkeypatch.context() as patch:
        patch.setattr(
            RunTrainer, "must_stop", lambda trainer, _: trainer.state.global_step == 3 and trainer.stop() is None
        )
        with pytest.raises(Terminated, match="stopped at step 3"):
            run_training(config, tmp_path)
    kept = disk.read_json(tmp_path / "checkpoint-3" / "unrecorded.json")
    assert (kept["accelerator_seconds"], kept["since"]) == (third + third, 2)
    run_training(config, tmp_path)
    trained = {row["step"]: row for row in history(tmp_path) if row["kind"] == "train"}
    assert [row["compute"]["accelerator_seconds"] for row in trained.values()] == [333333.0, 1000000.0]
    assert trained[4]["seconds"] >= round(kept["seconds"], 5) > trained[2]["seconds"]


def test_a_checkpoint_that_does_not_say_its_time_is_named(config: RunConfig, cut: Path) -> None:
    (cut / "checkpoint-4").rename(cut / "checkpoint-3")
    state = disk.read_json(cut / "checkpoint-3" / "trainer_state.json")
    disk.write_json(cut / "checkpoint-3" / "trainer_state.json", state | {"global_step": 3})
    (cut / "checkpoint-3" / "unrecorded.json").unlink()
    seal(cut / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3 does not say how long its run has taken.*delete the folder"):
        run_training(config, cut)


CONSTANT = {"schedule": "wsd", "decay": 0.0, "warmup": 0.0}


def test_a_run_is_lengthened_into_the_run_that_it_would_have_been(root: Path, tmp_path: Path) -> None:
    long = tiny_config(root, **CONSTANT, steps=6)
    run_training(long, tmp_path / "long")
    run_training(tiny_config(root, **CONSTANT), tmp_path / "run")
    assert cli.main(["train", str(tmp_path / "run"), "--train.steps", "6"]) == 0
    once, twice = (disk.read(tmp_path / name / "metrics.jsonl") for name in ("long", "run"))
    assert [row["loss"] for row in once if "loss" in row] == [row["loss"] for row in twice if "loss" in row]
    assert once[-1]["windows"] == twice[-1]["windows"]
    assert disk.read_json(tmp_path / "run" / "config.json")["train"]["steps"] == 6
    assert disk.read_json(tmp_path / "run" / "result.json")["eval"]["step"] == 6


@pytest.mark.parametrize(
    ("before", "after", "done", "message"),
    [
        ({}, {"steps": 300}, 100, r"steps was 200 and is 300, so the learning rate of step 1 would have been"),
        ({"schedule": "wsd"}, {"steps": 400, "schedule": "wsd"}, 100, r"with train\.warmup=0\.025 for as many steps"),
        ({"schedule": "wsd"}, {"steps": 400, "schedule": "wsd", "warmup": 0.025}, 100, None),
        ({"schedule": "wsd"}, {"steps": 400, "schedule": "wsd", "warmup": 0.025}, 161, r"rate of step 162 would have"),
        ({}, {"steps": 300}, 0, None),
        (CONSTANT, {**CONSTANT, "steps": 100}, 100, r"^train\.steps was 200 and is 100$"),
        (CONSTANT, {**CONSTANT, "steps": 400, "beta1": 0.8}, 100, r"^train\.beta1 was 0\.9 and is 0\.8$"),
        (CONSTANT, {**CONSTANT, "steps": 400}, 200, None),
    ],
)
def test_longer_only_where_no_step_would_change(
    before: dict[str, Any], after: dict[str, Any], done: int, message: str | None
) -> None:
    stored, wanted = (RunConfig(train=TrainConfig(**settings)) for settings in (before, after))
    if message is None:
        check_lengthening(stored, wanted, done)
        return
    with pytest.raises(ValueError, match=message):
        check_lengthening(stored, wanted, done)


def test_longer_runs_switch_and_are_evaluated_at_the_same_steps() -> None:
    stored, wanted = (RunConfig(train=TrainConfig(**CONSTANT, steps=steps)) for steps in (200, 400))
    timed = ArmConfig("time_hybrid", switch_at=0.5)
    with pytest.raises(ValueError, match=r"give the shares that say the same, arm\.switch_at=0\.25 arm\.warm_start=0"):
        check_lengthening(replace(stored, arm=timed), replace(wanted, arm=timed), 150)
    check_lengthening(replace(stored, arm=timed), replace(wanted, arm=replace(timed, switch_at=0.25)), 150)
    check_lengthening(replace(stored, arm=timed), replace(wanted, arm=timed), 50)
    warm = ArmConfig("moba", warm_start=0.5)
    with pytest.raises(ValueError, match=r"arm\.warm_start=0\.25"):
        check_lengthening(replace(stored, arm=warm), replace(wanted, arm=warm), 150)
    check_lengthening(replace(stored, arm=warm), replace(wanted, arm=replace(warm, warm_start=0.25)), 150)
    with pytest.raises(ValueError, match=r"so step 20, which is done, would have been evaluated"):
        check_lengthening(stored, replace(wanted, eval=EvalConfig(every=20)), 150)
    with pytest.raises(ValueError, match=r"step 2, which is done, would have been evaluated"):
        check_lengthening(replace(stored, eval=EvalConfig(count=3)), replace(wanted, eval=EvalConfig(count=10)), 150)


def test_a_warm_cache_may_be_read_only(config: RunConfig, root: Path, tmp_path: Path, trained: Path) -> None:
    cache = shutil.copytree(root / "cache", tmp_path / "cache")
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for file in cache.glob("*.lock"):
        assert not os.access(file, os.W_OK) or os.geteuid() == 0
    before = sorted(path.stat().st_mtime_ns for path in (cache, *cache.rglob("*")))
    data_module.load_data(replace(config.data, cache=str(cache)))
    assert sorted(path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))) == before, "nothing was written"


def test_a_folder_elsewhere_is_not_said_to_be_the_cache(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", "/home/nobody/.cache/datasets")

    with pytest.raises(PermissionError, match=r"/home/nobody/\.cache"):
        data_module.cached(tmp_path / "cache", "name", write)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*cache: Not a directory; set data\.cache"):
        data_module.cached(tmp_path / "file" / "cache", "name", write)


def test_a_strangers_run_makes_no_cache_where_it_says(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = disk.read_json(finished / "config.json")
    stored["data"]["cache"] = str(tmp_path / "somewhere")
    disk.write_json(finished / "config.json", stored)
    assert cli.main(["evaluate", str(finished)]) == 0
    evaluate_source(str(finished))
    assert not (tmp_path / "somewhere").exists()
    assert (tmp_path / ".data").exists()


def test_evaluations_say_what_they_need(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 2), ("train", 4), ("eval", 4)]


def test_a_checkpoint_written_again_is_whole(config: RunConfig, cut: Path) -> None:
    flip_a_byte(cut / "checkpoint-4" / "optimizer.pt")
    (cut / "checkpoint-4" / "stray").write_text("of the damaged one")
    run_training(config, cut)
    assert newest_checkpoint(cut) == cut / "checkpoint-4"
    assert not (cut / "checkpoint-4" / "stray").exists()


def test_a_cache_keeps_nothing_of_a_writer_that_was_killed(config: RunConfig, tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / "cache" / f".partial-{name}").mkdir(parents=True)
    with lock(tmp_path / "cache" / "alive.lock"):
        data_module.load_data(replace(config.data, cache=str(tmp_path / "cache")))
    assert [path.name for path in (tmp_path / "cache").glob(".partial-*")] == [".partial-alive"]


def test_a_damaged_cache_is_named(config: RunConfig, tmp_path: Path) -> None:
    data = replace(config.data, cache=str(tmp_path / "cache"))
    data_module.load_data(data)
    (tokens,) = (tmp_path / "cache").glob("tokens-*/tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"tokens\.npy is damaged .*; delete the folder .*tokens-\w+-\w+, it is made"):
        data_module.load_data(data)
    (sizes,) = (tmp_path / "cache").glob("documents-*/sizes.npy")
    sizes.write_bytes(b"")
    with pytest.raises(ValueError, match=r"sizes\.npy is damaged"):
        data_module.load_data(data)
