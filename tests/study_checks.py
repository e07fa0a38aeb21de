"""A study whose runs two processes train together against one process's: see `test_study_ranks.py`."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from ranks import made_alone, run_checks
from tiny import tiny_config, write_texts
from torch import distributed

from openmoba import cli
from openmoba.lab.data.identity import Known
from openmoba.lab.errors import DivergenceError
from openmoba.lab.progress import Progress
from openmoba.lab.study import ranks
from openmoba.lab.train.history import read_result
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk

RECIPE = """
title = "Two runs, and one that diverges"
[run]
data = {{ source = "{root}/texts", hold_out = 4, tokenizer = "bytes", length = 32, cache = "{root}/cache" }}
arm = {{ block_size = 4, top_k = 2 }}
model = {{ size = "nano" }}
train = {{ steps = 8, batch_size = 1, log_every = 2, checkpoint_every = 2, context_parallel = {context} }}
eval = {{ windows = 4, trailing = 8, position_range = 16 }}
[sizes.nano]
[sizes.wild]
train = {{ learning_rate = 1e30, clip = 1e30 }}
[arms]
full = {{ name = "full" }}
moba = {{ name = "moba" }}
[[stages]]
name = "wild"
sizes = ["wild"]
arms = ["full"]
[[stages]]
name = "pretrain"
sizes = ["nano"]
arms = ["moba", "full"]
"""
RUNS = ["pretrain/nano-moba-seed0", "pretrain/nano-full-seed0"]
KNOWN = [Known("another run", {"train": "1f2e"}, "restore it")]


def root() -> Path:
    return Path(sys.argv[1])


def study(out: str, context: int) -> tuple[int, str]:
    """Give the command; returns its exit code and what it said on standard error."""
    with redirect_stderr(io.StringIO()) as said:
        code = cli.main(["study", str(root() / f"{context}.toml"), "--out", str(root() / out)])
    return code, said.getvalue()


def losses(folder: Path) -> list[float]:
    rows = disk.read(folder / "metrics.jsonl")
    return [row["loss"] if row["kind"] == "train" else row["lm_loss"] for row in rows]


def alone() -> list[list[float]]:
    code, said = study("alone", 1)
    assert (code, said.count("error: 1 of 3 runs failed.")) == (2, 1), said
    return [losses(root() / "alone" / run) for run in RUNS]


def as_one_process() -> None:
    """Stopped within the second run as by a kill, and gone on with; the run that diverged is recorded once."""
    step, first, taken = RunTrainer.training_step, distributed.get_rank() == 0, []

    def stop(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.folder.name == "nano-moba-seed0":
            taken.append(trainer.state.global_step)
        if taken == [0, 1, 2, 3, 4, 5]:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    folder = root() / "together"
    with patch.object(ranks, "leave_group", distributed.barrier), patch.object(RunTrainer, "training_step", stop):
        assert study("together", 2)[0] == 130
        distributed.barrier()
        assert not (folder / RUNS[0] / "result.json").exists()
        distributed.barrier()
        code, said = study("together", 2)
    assert taken == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert code == (2 if first else 0)
    assert said.count("error: 1 of 3 runs failed.") == (1 if first else 0), said
    assert (folder / "report.md").exists() or not first
    assert "learning_rate" in disk.read_json(folder / "wild" / "wild-full-seed0" / "failed.json")["reason"]
    mesh = {"data": 1, "context": 2}
    for run, expected in zip(RUNS, made_alone("study"), strict=True):
        assert losses(folder / run) == pytest.approx(expected, rel=1e-3), run
        assert read_result(folder / run)[1]["mesh"] == mesh
        assert all(row["mesh"] == mesh for row in disk.read(folder / run / "metrics.jsonl") if row["kind"] == "train")


def refused_in_one_sentence() -> None:
    with patch.object(ranks, "leave_group"):
        code, said = study("refused", 1)
    if distributed.get_rank() > 0:
        assert (code, said) == (0, "")
        return
    begin = (
        "error: run wild/wild-full-seed0: train.batch_size=1 does not divide into 2 device(s) with micro-batches of 1; "
    )
    assert code == 2
    assert said.startswith(begin), said
    assert "have train.context_parallel=2 processes share each window" in said
    assert not (root() / "refused").exists()


def work(train: Any, folders: list[str]) -> list[str]:
    """Train these runs, one after another; returns those that diverged."""
    settings, diverged = tiny_config(root()), []
    if distributed.get_rank() > 0:
        ranks.follow(train)
        return []
    with ranks.leading(train) as together:
        for name in folders:
            try:
                together(settings, Path(name), progress=Progress(), known=KNOWN)
            except DivergenceError:
                diverged.append(name)
    return diverged


def all_train_what_the_first_says() -> None:
    """And go on after a run that diverged, which all of them know."""
    done = []

    def train(config: Any, folder: Path, **given: Any) -> dict[str, Any]:
        assert (config, given["known"]) == (tiny_config(root()), KNOWN)
        done.append(folder.name)
        if folder.name == "b":
            raise DivergenceError("not finite")
        return {}

    with patch.object(ranks, "leave_group") as left:
        diverged = work(train, ["a", "b", "c"])
    assert done == ["a", "b", "c"]
    assert diverged == (["b"] if distributed.get_rank() == 0 else [])
    left.assert_called_once()


def one_speaks_where_all_fail() -> None:
    def train(*_: Any, **__: Any) -> dict[str, Any]:
        raise ValueError("the disk is full")

    if distributed.get_rank() > 0:
        assert work(train, ["a"]) == []
        return
    with pytest.raises(ValueError, match="the disk is full"):
        work(train, ["a"])


def others_end_where_the_first_fails_alone() -> None:
    with patch.object(ranks, "leave_group"):
        if distributed.get_rank() > 0:
            work(None, [])
            return
        with pytest.raises(ValueError, match="no such recipe"), ranks.leading(lambda: {}):
            raise ValueError("no such recipe")


def who_fails_alone_speaks() -> None:
    def train(*_: Any, **__: Any) -> dict[str, Any]:
        if distributed.get_rank() == 0:
            distributed.barrier()  # in a transfer, which the other's end breaks off
            raise RuntimeError("Connection closed by peer")
        raise ValueError("no memory here")

    said = ["Connection closed", "no memory here"][distributed.get_rank()]
    with patch.object(ranks, "_PATIENCE", timedelta(seconds=5)), pytest.raises((RuntimeError, ValueError), match=said):
        work(train, ["a"])
    if distributed.get_rank() > 0:
        distributed.barrier()


if __name__ == "__main__":
    write_texts(root() / "texts")
    for processes in (1, 2):
        (root() / f"{processes}.toml").write_text(RECIPE.format(root=root(), context=processes))
    run_checks(
        {
            "as one process": as_one_process,
            "refused in one sentence": refused_in_one_sentence,
            "all train what the first says": all_train_what_the_first_says,
            "one speaks where all fail": one_speaks_where_all_fail,
            "others end where the first fails alone": others_end_where_the_first_fails_alone,
            "who fails alone speaks": who_fails_alone_speaks,
        },
        {"study": alone},
    )
