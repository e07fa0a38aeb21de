"""Windows that processes share are windows: the checks are in `lab_checks.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lab_checks import CASES, config, curve
from ranks import checked
from tiny import tiny_config

from openmoba.errors import explain
from openmoba.lab.config import changes
from openmoba.lab.train import arguments
from openmoba.lab.train.run import run_training


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, list[str]]:
    return checked("lab_checks.py", 2, root)


@pytest.mark.parametrize(
    "check",
    [*CASES, "go on", "stopped at the end", "stopped at the result", "sharded too", "refusals", "one dies"],
)
def test_two_processes_share_windows(outcomes: dict[str, list[str]], check: str) -> None:
    assert not outcomes[check], "\n".join(outcomes[check])


def test_one_process_goes_on_with_the_run_of_two(outcomes: dict[str, list[str]], root: Path) -> None:
    assert not outcomes["go on"]
    run_training(config(root), root / "begun by two")
    assert curve(root / "begun by two") == pytest.approx(curve(root / "alone by heads"), rel=1e-3)


def test_what_cannot_be_shared_is_said_before_data_are_read(tmp_path: Path) -> None:
    plain = tiny_config(tmp_path, context_parallel=2)
    with pytest.raises(ValueError, match="do not divide the 1 there are; start a multiple of 2, as torchrun"):
        run_training(plain, tmp_path / "run")
    assert changes(plain, tiny_config(tmp_path)) == []


@pytest.mark.parametrize(("ranks", "priority"), [(2, "1"), (1, None)])
def test_transfers_go_first_before_there_is_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, priority: str | None
) -> None:
    """Trainer's settings make the process group, which reads the variable then."""
    read: list[str | None] = []

    def make_group(**_: object) -> None:
        read.append(os.environ.get("TORCH_NCCL_HIGH_PRIORITY"))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2"})
    monkeypatch.setattr(arguments, "TrainingArguments", make_group)
    with pytest.raises(KeyboardInterrupt):
        arguments.training_arguments(tiny_config(tmp_path, context_parallel=ranks), tmp_path)
    assert read == [priority]


def test_a_lost_process_is_explained() -> None:
    assert "start all of them again" in str(explain(RuntimeError("gloo: Connection closed by peer [::1]:1")))
    assert explain(RuntimeError("another fault")) is None
