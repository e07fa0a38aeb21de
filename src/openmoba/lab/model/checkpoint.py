"""Checkpoints of a run: sealed when they are whole, checked before they are used, kept while somebody reads them.

Trainer writes `checkpoint-STEP` file by file, so a kill may leave a part of one. The last thing written is the
seal: size and hash of every file. Weights are safetensors; optimizer and random states are read with
`torch.load(weights_only=True)`, which runs no code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openmoba.lab.progress import Progress
from openmoba.records.disk import read_json, write_json
from openmoba.records.locks import lock_existing

SEAL = "complete.json"


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer steps done at a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Declare the files of a checkpoint whole, once they are on the disk."""
    # Trainer's pickled arguments: this laboratory never reads them, and nobody should have to trust them.
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    sizes, hashes = {}, {}
    for path in sorted(path for path in checkpoint.iterdir() if path.name != SEAL):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name], hashes[path.name] = path.stat().st_size, _hash(path)
    write_json(checkpoint / SEAL, {"files": sizes, "blake2b": hashes})


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole.

    Args:
        contents: read the files too, where the seal has their hashes; otherwise look at their sizes alone.
    """
    try:
        found = read_json(checkpoint / SEAL)
        sizes, hashes = found["files"].items(), found.get("blake2b", {})
    except (ValueError, KeyError, AttributeError):
        return "it was not finished"
    for name, size in sizes:
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if contents and name in hashes and _hash(path) != hashes[name]:
            return f"{name} is not what was written (its hash differs)"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """List the run's checkpoint folders, newest first, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_checkpoint(run: Path, progress: Progress | None = None) -> Path | None:
    """Find the run's newest whole checkpoint, for whoever trains the run; see `newest_held`."""
    with newest_held(run, progress) as checkpoint:
        return checkpoint


@contextmanager
def newest_held(run: Path, progress: Progress | None = None) -> Iterator[Path | None]:
    """Find the run's newest whole checkpoint; None if it has no checkpoints but unfinished ones.

    Training beside it does not prune the checkpoint in the body of the `with`. Damaged ones are passed over, with a
    note.

    Raises:
        ValueError: finished checkpoints are there, and all of them are damaged.
    """
    problems: list[str] = []
    for checkpoint in (listed := checkpoints(run)):
        with lock_existing(checkpoint / SEAL, shared=True):
            finished = (checkpoint / SEAL).exists()
            problem = damage(checkpoint)
            if problem is None:
                yield checkpoint
                return
        if checkpoint.exists():
            (progress or Progress()).note(f"{checkpoint} is not used: {problem}")
            problems += [f"{checkpoint}: {problem}"] * finished
    if checkpoints(run) != listed:  # training went on meanwhile
        with newest_held(run, progress) as newer:
            yield newer
    elif problems:
        raise ValueError(
            f"no usable checkpoint ({'; '.join(problems)}); restore the files, "
            f"or delete the folder {run} to start the run again"
        )
    else:
        yield None


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` whole ones: older steps, and parts that a kill left.

    One that is being read stays until a later call.
    """
    whole = [checkpoint for checkpoint in checkpoints(run) if damage(checkpoint, contents=False) is None]
    for checkpoint in checkpoints(run):
        if checkpoint not in whole[:keep]:
            with lock_existing(checkpoint / SEAL) as mine:
                if mine:
                    shutil.rmtree(checkpoint)
