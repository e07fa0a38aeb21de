"""Starts a few processes that share a process group over gloo, and runs checks in all of them.

A module of checks calls `run_checks()` when it is started as a program; its test calls `checked(module)`, which gives
what went wrong by check and rank. One start serves all checks of a module, as starting takes longer than they do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

TIMEOUT = 100  # seconds
PATIENCE = timedelta(seconds=10)  # that a process waits for the others, after which a check has failed


def checked(program: str, ranks: int, folder: Path) -> dict[str, list[str]]:
    """Run a module of checks beside this file with so many processes; what went wrong, by check."""
    path = Path(__file__).with_name(program)
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), str(folder)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [report[name] for report in reports if report[name]] for name in reports[0]}


def run_checks(checks: dict[str, Callable[[], Any]]) -> None:
    """Run the checks in this process and write down what went wrong; after a failure, processes are out of step."""
    folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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
    os._exit(0)  # a group that others have left cannot be taken down in order
