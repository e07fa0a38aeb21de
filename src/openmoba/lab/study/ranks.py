"""A study on several processes of torchrun: the first one works through it, the others train with it what it trains.

The first process alone reads the recipe, claims runs, and speaks; the others learn of a run when it begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from openmoba.lab.config import RunConfig
from openmoba.lab.data.identity import Known
from openmoba.lab.errors import DivergenceError
from openmoba.lab.progress import Progress
from openmoba.lab.train.arguments import process_count
from openmoba.parallel import leave_group, prioritize_transfers
from openmoba.records.disk import Row

Train = Callable[..., Row]
Work = tuple[RunConfig, Path, Sequence[Known]]
"""What a process has to know to train a run with others: settings, folder, and data that must agree."""

_LONGEST_WAIT = timedelta(days=30)  # for a run that another study's process trains; who dies is noticed at once
_PATIENCE = timedelta(seconds=10)  # after an error here, for the same error in the other processes


@contextmanager
def leading(train: Train) -> Iterator[Train]:
    """Give the body of the `with`, in the first process, a `train` that all processes carry out together.

    The others call `follow`. They end with the body, however it ends; `train` itself where there are no others.
    """
    if process_count() == 1:
        yield train
        return
    processes = _Processes()
    listening = True

    def together(config: RunConfig, folder: Path, *, progress: Progress, known: Sequence[Known] = ()) -> Row:
        nonlocal listening
        processes.say((config, folder, known))
        listening = False
        try:
            result = train(config, folder, progress=progress, known=known)
        except DivergenceError:  # agreed among all
            listening = True
            raise
        except Exception:
            processes.all_failed()
            raise
        listening = True
        return result

    try:
        yield together
    finally:
        if listening:
            processes.say(None)
            leave_group()


def follow(train: Train) -> None:
    """Train with the first process what it trains, until it has nothing more, or has an error, which it says itself.

    Raises:
        Exception: what went wrong in this process alone.
    """
    processes = _Processes()
    while (work := processes.say(None)) is not None:
        config, folder, known = work
        try:
            train(config, folder, known=known)
        except DivergenceError:
            continue
        except Exception:
            if processes.all_failed():
                return
            raise
    leave_group()


class _Processes:
    """What processes tell each other, over the CPU, beside the group that training takes up."""

    def __init__(self) -> None:
        prioritize_transfers()
        if torch.cuda.is_available():  # on which they leave their group, be it before anything is trained
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not distributed.is_initialized():
            distributed.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
        self._failed = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self._work = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def say(self, work: Work | None) -> Work | None:
        """Return what the first process says."""
        said = [work]
        distributed.broadcast_object_list(said, src=0, group=self._work, device=torch.device("cpu"))
        return said[0]

    def all_failed(self) -> bool:
        """Tell whether all processes come here within `_PATIENCE`: what went wrong in one then did so in all."""
        try:
            distributed.barrier(self._failed)
        except RuntimeError:
            return False
        return True
