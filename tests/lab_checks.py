"""A run whose windows two processes share against one process's: see `test_lab_parallel.py`."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from as_gpus import laboratory_as_gpus
from ranks import PATIENCE, made_alone, run_checks
from tiny import tiny_config
from torch import distributed

from openmoba.errors import explain
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import RunConfig
from openmoba.lab.errors import Terminated
from openmoba.lab.model import compile
from openmoba.lab.train.history import read_result
from openmoba.lab.train.run import run_training
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk


@cache
def tiny(root: Path) -> RunConfig:
    """The run of `tiny.py`, whose documents are written once: other processes may be reading them."""
    return tiny_config(root)


def config(root: Path, kv_heads: int = 2, key_conv: int | None = None, **train: Any) -> RunConfig:
    """A hybrid on windows of 37 tokens, evaluated on three: numbers that no number of processes divides."""
    plain = tiny(root)
    heads = {"num_key_value_heads": kv_heads}
    return replace(
        plain,
        train=replace(plain.train, **train),
        eval=replace(plain.eval, contexts=(16,), windows=3),
        data=replace(plain.data, length=37),
        model=replace(plain.model, overrides={**plain.model.overrides, **heads}),
        arm=ArmConfig("hybrid", block_size=4, top_k=2, full_layers=1, key_conv=key_conv),
    )


CASES: dict[str, dict[str, Any]] = {
    "by heads": {},
    "by keys": {"kv_heads": 1},
    "key convolution": {"key_conv": 4},
    "a mask of the loss, computed again": {"loss_tokens": 9, "gradient_checkpointing": True, "micro_batch_size": 1},
}


IN_16_BITS: dict[str, Any] = {"precision": "bf16", "compile": "layers", "gradient_checkpointing": True}


def curve(folder: Path) -> list[float]:
    """Losses and gradients of training, then what the evaluation says of each window and range."""
    rows = disk.read(folder / "metrics.jsonl")
    found = [row[name] for row in rows if row["kind"] == "train" for name in ("loss", "grad_norm")]
    last = next(row for row in rows if row["kind"] == "eval")
    return [
        *found,
        last["trailing_loss"],
        *last["windows"]["lm"],
        *(part["loss"] for part in last["position_loss"] + last["context_loss"]),
    ]


def same(folder: Path, name: str) -> None:
    """Compare with what one process made; after a few steps sums in another order are a little apart."""
    found, expected = curve(folder), made_alone(name)
    assert found == pytest.approx(expected, rel=1e-3), f"{found} {expected}"


def root() -> Path:
    return Path(sys.argv[1])


def alone(name: str) -> list[float]:
    folder = root() / f"alone {name}"
    run_training(config(root(), **CASES[name]), folder)
    return curve(folder)


def stop_halfway(settings: RunConfig, folder: Path) -> None:
    """Train two of the four steps, as if a signal had come."""

    def stop(trainer: RunTrainer, agreeing: bool) -> bool:
        trainer.stopping = trainer.state.global_step == 2
        return trainer.stopping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "must_stop", stop)
        with pytest.raises(Terminated):
            run_training(settings, folder)


def begin() -> list[float]:
    """A run that one process begins, and two go on with."""
    stop_halfway(config(root()), root() / "begun by one")
    return []


def shared(name: str) -> None:
    folder = root() / f"shared {name}"
    run_training(config(root(), context_parallel=2, **CASES[name]), folder)
    distributed.barrier()
    same(folder, name)
    mesh = {"data": 1, "context": 2}
    assert all(row["mesh"] == mesh for row in disk.read(folder / "metrics.jsonl") if row["kind"] == "train")
    assert read_result(folder)[1]["mesh"] == mesh


def go_on() -> None:
    """Two processes go on with the run of one, and begin one for another to go on with."""
    settings = config(root(), context_parallel=2)
    run_training(settings, root() / "begun by one")
    distributed.barrier()
    same(root() / "begun by one", "by heads")
    stop_halfway(settings, root() / "begun by two")


def alone_in_16_bits() -> list[float]:
    folder = root() / "alone in 16 bits"
    with patch.object(compile, "compile_layers", lambda model: None):
        run_training(config(root(), **IN_16_BITS), folder)
    return curve(folder)


def sharded_too() -> None:
    """As on GPUs, by accelerate's mesh with FSDP2, after a try-out of what would be compiled; goes on with other N."""
    with laboratory_as_gpus(), patch.object(compile, "compile_layers", lambda model: None):
        run_training(config(root(), context_parallel=2, fsdp=True, **IN_16_BITS), root() / "sharded")
        distributed.barrier()
        same(root() / "sharded", "in 16 bits")
        stop_halfway(config(root(), context_parallel=2, fsdp=True, **IN_16_BITS), root() / "sharded, stopped")
        run_training(config(root(), fsdp=True, **IN_16_BITS), root() / "sharded, stopped")
        distributed.barrier()
        same(root() / "sharded, stopped", "in 16 bits")


def stopped_at_the_end() -> None:
    """A signal that one process gets in the last step ends all of them, with the result."""
    plain = RunTrainer.training_step

    def signalled(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if distributed.get_rank() == first and trainer.state.global_step + 1 == trainer.config.train.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(trainer, *args, **kwargs)

    for first in (0, 1):
        folder = root() / f"stopped at the end by {first}"
        with patch.object(RunTrainer, "training_step", signalled), pytest.raises(Terminated, match="is finished"):
            run_training(config(root(), context_parallel=2), folder)
        same(folder, "by heads")
        assert (folder / "result.json").exists()


def stopped_at_the_result() -> None:
    """A signal that the first process gets while it writes the result ends all of them, and after that."""
    plain = disk.write_json

    def signalled(path: Path, content: Any) -> None:
        if path.name == "result.json":
            os.kill(os.getpid(), signal.SIGTERM)
        plain(path, content)

    folder = root() / "stopped at the result"
    with patch.object(disk, "write_json", signalled), pytest.raises(Terminated, match="is finished"):
        run_training(config(root(), context_parallel=2), folder)
    same(folder, "by heads")
    assert (folder / "result.json").exists()


def refusals() -> None:
    for train, said in (
        ({"context_parallel": 3}, "do not divide the 2 there are; start a multiple of 3"),
        ({"context_parallel": 2, "batch_size": 3, "micro_batch_size": 2}, r"does not divide into 1 device\(s\)"),
    ):
        with pytest.raises(ValueError, match=said):
            run_training(config(root(), **train), root() / "refused")


def one_dies() -> None:
    """In the middle of a step; the others end with one sentence, and not after the timeout."""
    step = RunTrainer.training_step

    def die(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    settings = config(root(), context_parallel=2)
    if distributed.get_rank() == 1:
        with patch.object(RunTrainer, "training_step", die), pytest.raises(KeyboardInterrupt):
            run_training(settings, root() / "lost")
        return  # and with it the process
    start = time.monotonic()
    with pytest.raises(RuntimeError) as lost:
        run_training(settings, root() / "lost")
    assert "another process has ended" in str(explain(lost.value))
    assert time.monotonic() - start < PATIENCE.total_seconds()
    assert (root() / "lost" / "checkpoint-2").exists()  # from where the same command goes on


if __name__ == "__main__":
    tiny(root())
    run_checks(
        {
            **{name: partial(shared, name) for name in CASES},
            "go on": go_on,
            "stopped at the end": stopped_at_the_end,
            "stopped at the result": stopped_at_the_result,
            "sharded too": sharded_too,
            "refusals": refusals,
            "one dies": one_dies,
        },
        {**{name: partial(alone, name) for name in CASES}, "begin": begin, "in 16 bits": alone_in_16_bits},
    )
