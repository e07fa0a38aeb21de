"""Starts a few processes that share a process group over gloo, and runs checks in all of them.

A module of checks calls `run_checks()` when it is started as a program; its test calls `checked(program, ranks)`, which
gives what went wrong by check and rank. One start serves all checks of a module, and its processes are forked after all
imports, as these take longer than the checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT = 300  # seconds, on a machine that does much else
PATIENCE = timedelta(seconds=60)  # that a process waits for the others, after which a check has failed


def checked(program: str, ranks: int, folder: Path) -> dict[str, list[str]]:
    """Run a module of checks beside this file with so many processes; what went wrong, by check."""
    path = Path(__file__).with_name(program)
    done = subprocess.run(
        [sys.executable, str(path), str(folder), str(ranks)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [report[name] for report in reports if report[name]] for name in reports[0]}


def run_checks(checks: dict[str, Callable[[], Any]], alone: dict[str, Callable[[], Any]] | None = None) -> None:
    """Fork the processes, run the checks in each, and write down what went wrong in it.

    Args:
        alone: what one process without a group makes first, by name, for `made_alone`.
    """
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    if alone is not None:
        _fork(lambda: torch.save({name: make() for name, make in alone.items()}, folder / "alone.pt"))()
    waits = [_fork(partial(_run_in, folder, rank, ranks, checks)) for rank in range(ranks)]
    for wait in waits:
        wait()


def made_alone(name: str) -> Any:
    """What one process made under this name."""
    return torch.load(Path(sys.argv[1]) / "alone.pt", weights_only=True)[name]


def _fork(run: Callable[[], Any]) -> Callable[[], None]:
    """Run in a process of its own; the result waits for its end."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # a group that others have left cannot be taken down in order

    def wait() -> None:
        if os.waitpid(child, 0)[1]:
            sys.exit(1)

    return wait


def _run_in(folder: Path, rank: int, ranks: int, checks: dict[str, Callable[[], Any]]) -> None:
    """Run all checks until one fails, since processes are out of step then."""
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    unused = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # that accelerate asks for all the same
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | size | unused
    store = distributed.FileStore(str(folder / "store"), ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    report = dict.fromkeys(checks, "not run")
    for name, check in checks.items():
        try:
            check()
        except Exception:
            report[name] = traceback.format_exc()
            break
        report[name] = ""
    (folder / f"{rank}.json").write_text(json.dumps(report))
