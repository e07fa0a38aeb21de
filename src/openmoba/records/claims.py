"""Claims: at most one process works on a run at a time.

A claim is an advisory lock (flock) held on a file in the run's folder. The kernel drops it when the holder
ends, however it ends, so a killed process leaves no stale claim behind and nobody has to guess from its age.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIM_FILE = "claim.lock"


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold the claim on `folder` for the body of the `with`; False when another process has it.

    The file stays behind (removing it would race with a process that has just opened it) and names the last
    holder, for people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / CLAIM_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield True


def holder(folder: Path) -> str:
    """Say who claimed `folder` last, as written by `claim`; empty when nobody did."""
    file = folder / CLAIM_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""
