"""Locks between processes: one writes a cache, one works on a run.

A lock is an advisory one (flock) on a file. The kernel drops it when the holder ends, however it ends, so a killed
process leaves no stale lock behind and nobody has to guess from its age. The file stays: removing it would race with a
process that has just opened it.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

CLAIM_FILE = "claim.lock"


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[IO[str] | None]:
    """Hold the lock `path` for the body of the `with`, which gets the open file.

    Args:
        wait: until whoever has it is done; without it the body gets None then.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file


@contextmanager
def lock_existing(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a file that is only read, for the body of the `with`; a file that is not there needs none.

    Args:
        shared: with other readers, after waiting for who has it alone; else alone, and False where another has it.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb" if shared else "r+b"))
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except FileNotFoundError:
            pass
        yield True


@contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the claim on `folder` for the body of the `with`; False when another process has it.

    Its file names the last holder, for people, and its time is when that one claimed it.

    Args:
        wait: until the other process drops it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / CLAIM_FILE, wait=wait) as file:
        if file is not None:
            _sign(file)
        yield file is not None


def _sign(file: IO[str]) -> None:
    """Have a claim name this process; past the buffer, which would be written once more when the file is closed."""
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def holder(folder: Path) -> str:
    """Read who claimed `folder` last, as written by `claim`; empty when nobody did."""
    file = folder / CLAIM_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""
