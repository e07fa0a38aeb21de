"""Runs that are killed and go on: every record once, nothing missing, nothing that sticks from a failed start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import TIMEOUT
from tiny import curve, interrupt, one_thread, openmoba_until, tiny_config

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import ModelConfig, RunConfig, to_dict
from openmoba.lab.errors import Terminated
from openmoba.lab.model.checkpoint import newest_checkpoint
from openmoba.lab.train.clock import Clock
from openmoba.lab.train.history import history, history_until
from openmoba.lab.train.run import run_training
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk
from openmoba.records.locks import claim


def test_a_killed_run_goes_on_with_the_same_records(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    """Killed twice: once somewhere after the first checkpoint, once in the middle of writing one."""
    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(config))
    command = [*openmoba_until(9), "train", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread()) as process:
        deadline = time.monotonic() + TIMEOUT
        while newest_checkpoint(folder) is None and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "result.json").exists()
    assert newest_checkpoint(folder) is not None

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
    done = subprocess.run(command, check=False, capture_output=True, env=one_thread())
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


def test_a_finished_run_is_not_trained_again(
    config: RunConfig, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunTrainer, "train", None)
    assert run_training(config, finished) == disk.read_json(finished / "result.json")


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
        interrupt(timed, tmp_path / "cut", stop)
    run_training(timed, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    saved = disk.read_json(tmp_path / "cut" / "checkpoint-12" / "config.json")
    assert saved.get("moba") is None


def test_evaluations_evenly_spaced_in_log_compute_are_the_same_after_a_kill(config: RunConfig, tmp_path: Path) -> None:
    spaced = replace(config, eval=replace(config.eval, every=None, count=5))
    assert spaced.evaluation_steps == (1, 2, 3, 6, 12)
    run_training(spaced, tmp_path / "whole")
    assert [row["step"] for row in curve(tmp_path / "whole") if row["kind"] == "eval"] == [1, 2, 3, 6, 12]
    interrupt(spaced, tmp_path / "cut", 7)
    run_training(spaced, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def drop(folder: Path, kind: str, step: int) -> None:
    rows = disk.read(folder / "metrics.jsonl")
    disk.keep(folder / "metrics.jsonl", [row for row in rows if (row["kind"], row["step"]) != (kind, step)])


@pytest.mark.parametrize(("kind", "step"), [("train", 2), ("train", 4), ("eval", 4)])
def test_a_run_does_not_go_on_over_a_lost_record(short: RunConfig, cut: Path, kind: str, step: int) -> None:
    drop(cut, kind, step)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl lacks the .* of step {step}, though .* is at step 4; rest"):
        run_training(short, cut)


def test_the_last_step_has_a_record_wherever_the_others_are(short: RunConfig, cut: Path) -> None:
    every_third = replace(short, train=replace(short.train, log_every=3, checkpoint_every=3))
    rows = [{**row, "step": 3} if row["step"] == 2 else row for row in disk.read(cut / "metrics.jsonl")]
    disk.keep(cut / "metrics.jsonl", rows)
    assert history_until(cut, every_third, 4) == history(cut)
    drop(cut, "train", 4)
    with pytest.raises(ValueError, match="lacks the record of training of step 4"):
        history_until(cut, every_third, 4)


@pytest.mark.parametrize("step", [2, 4])
def test_a_record_twice_is_named(short: RunConfig, cut: Path, step: int) -> None:
    rows = disk.read(cut / "metrics.jsonl")
    disk.append(cut / "metrics.jsonl", next(row for row in rows if (row["kind"], row["step"]) == ("train", step)))
    with pytest.raises(ValueError, match=rf"record of training of step {step} comes after that of step 4"):
        run_training(short, cut)


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


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_run_that_gets_sigterm_keeps_its_last_step_and_goes_on_as_if_it_had_not(
    short: RunConfig,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop_at: int,
) -> None:
    """Between two records, too: the losses since the last one are in the checkpoint."""
    plain = RunTrainer.training_step

    def terminated(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(trainer, *args, **kwargs)

    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(short))
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", terminated)
        assert cli.main(["train", str(folder)]) == 143
    said = capsys.readouterr().err
    assert (folder / f"checkpoint-{stop_at}").exists()
    if stop_at < 4:
        assert f"stopped at step {stop_at} with a checkpoint; the same command goes on" in said
        run_training(short, folder)
    else:
        assert "is finished" in said
    assert curve(folder) == curve(trained)


def test_a_run_that_gets_sigterm_while_it_writes_its_result_writes_it(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.write_json(tmp_path / "config.json", to_dict(short))
    plain = disk.write_json

    def terminated(path: Path, content: Any) -> None:
        if path.name == "result.json":
            os.kill(os.getpid(), signal.SIGTERM)
        plain(path, content)

    monkeypatch.setattr(disk, "write_json", terminated)
    for _ in ("after its last step", "after its last checkpoint, by the same command"):
        assert cli.main(["train", str(tmp_path)]) == 143
        assert f"{tmp_path} is finished" in capsys.readouterr().err
        (tmp_path / "result.json").unlink()


def test_a_run_that_never_began_gives_way(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    disk.write_json(folder / "config.json", to_dict(replace(config, model=ModelConfig(size="7b"))))
    run_training(config, folder)
    assert curve(folder) == curve(finished)


def test_a_start_that_fails_leaves_no_settings(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RunTrainer, "training_step", fail)
    with pytest.raises(RuntimeError):
        run_training(short, tmp_path / "run")
    assert list((tmp_path / "run").glob("*.json")) == []
    given = tmp_path / "run" / "config.json"
    given.write_text("{}")
    with pytest.raises(RuntimeError):
        run_training(short, tmp_path / "run")
    assert given.read_text() == "{}", "what was there before stays"


def test_leftovers_of_a_killed_writer_are_removed(short: RunConfig, copied: Path) -> None:
    left, other = copied / ".config.json.999999999", copied / f".result.json.{os.getpid()}"
    for path in (left, other, copied / ".hidden", copied / ".5"):
        path.write_text("{")
    run_training(short, copied)
    assert not left.exists()
    assert other.exists(), "its writer lives"
    assert (copied / ".hidden").exists()
    assert (copied / ".5").exists()


def test_one_process_trains_a_run(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk.write_json(tmp_path / "config.json", to_dict(config))
    with claim(tmp_path):
        assert cli.main(["train", str(tmp_path)]) == 2
    assert f"is being trained by process {os.getpid()} on" in capsys.readouterr().err


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


@pytest.mark.parametrize(("steps", "said"), [(0, "begins it again"), (3, "goes on from step 2")])
def test_whoever_interrupts_a_run_is_told_where_it_goes_on(steps: int, said: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    interrupt(config, tmp_path / "run", steps, f"run stopped; the same command {said}")
    assert run_training(config, tmp_path / "run")["eval"]["step"] == 4
