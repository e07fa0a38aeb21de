"""Checkpoints of a run: sealed when they are whole, checked before they are used.

Trainer writes `checkpoint-STEP` file by file, so a kill may leave a part of one. The last thing written is the
seal: the size of every file. Weights are safetensors; optimizer and random states are read with
`torch.load(weights_only=True)`, which runs no code.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from openmoba.lab.progress import Progress
from openmoba.lab.records import read_json, write_json

SEAL = "complete.json"


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Declare the files of a checkpoint whole, once they are on the disk."""
    # Trainer's pickled arguments: this laboratory never reads them, and nobody should have to trust them.
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    sizes = {}
    for path in sorted(checkpoint.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    write_json(checkpoint / SEAL, {"files": sizes})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        sizes = read_json(checkpoint / SEAL)["files"]
    except (ValueError, KeyError):
        return "it was not finished"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            return f"{name} has {found} bytes, not {size}" if path.exists() else f"{name} is missing"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, newest first, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_checkpoint(run: Path, progress: Progress | None = None) -> Path | None:
    """The run's newest whole checkpoint; None if it has no checkpoints but unfinished ones.

    Raises:
        ValueError: finished checkpoints are there, and all of them are damaged.
    """
    problems = []
    for checkpoint in checkpoints(run):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        (progress or Progress()).note(f"{checkpoint} is not used: {problem}")
        if (checkpoint / SEAL).exists():
            problems.append(f"{checkpoint}: {problem}")
    if problems:
        raise ValueError(
            f"no usable checkpoint ({'; '.join(problems)}); restore the files, "
            f"or delete the folder {run} to start the run again"
        )
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` whole ones: older steps, and parts that a kill left."""
    whole = [checkpoint for checkpoint in checkpoints(run) if damage(checkpoint) is None]
    for checkpoint in checkpoints(run):
        if checkpoint not in whole[:keep]:
            shutil.rmtree(checkpoint)
