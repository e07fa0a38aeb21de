"""The loss of every position of some windows, and sums of them by window."""

# W windows, T positions

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmoba.lab.data.windows import IGNORED, Windows
from openmoba.lab.measure.resample import mean_interval
from openmoba.lab.model.split import SharedLosses
from openmoba.lab.progress import Progress

TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""(input_ids, labels) -> loss per token; a model after `attach_loss` is one."""


@dataclass(frozen=True)
class Sums:
    """The losses of a part of some windows.

    Attributes:
        total_W: sum of the part's losses of each window, in nats.
        count_W: how many positions of the part carry loss.
        document_W: a number per window, equal for windows of one document.
    """

    total_W: np.ndarray
    count_W: np.ndarray
    document_W: np.ndarray

    @property
    def mean(self) -> float | None:
        """Return the mean over all positions; None without any."""
        return float(self.total_W.sum() / self.count_W.sum()) if self.count_W.sum() else None

    @property
    def each(self) -> list[float | None]:
        """Return each window's mean to six digits; None for a window without positions."""
        pairs = zip(self.total_W, self.count_W, strict=True)
        return [float(f"{total / count:.6g}") if count else None for total, count in pairs]

    @property
    def bounds(self) -> list[float] | None:
        """Return the interval of the mean, see `mean_interval`."""
        interval = mean_interval(self.total_W, self.count_W, self.document_W)
        return None if interval is None else [interval.low, interval.high]


def window_losses(
    losses: TokenLosses,
    windows: Windows,
    batch_size: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return every position's loss, float32 `[W, T]`, 0 where not labelled, and the labelled, bool `[W, T]`.

    Under torchrun, each process computes a share of the windows and all get the whole. Those that compute losses
    together, see `SharedLosses`, have the same share.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if isinstance(losses, SharedLosses):
        rank, world = rank // losses.ranks, world // losses.ranks
    # Sharded parameters need as many forward passes in every process, so the last shares wrap around.
    share = np.resize(np.arange(len(windows)), -(-len(windows) // world) * world)[rank::world]
    parts = []
    with torch.no_grad():
        for start in range(0, len(share), batch_size):
            batch = [windows[int(i)] for i in share[start : start + batch_size]]
            input_ids, labels = (torch.stack([w[key] for w in batch]) for key in ("input_ids", "labels"))
            loss_BT = losses(input_ids.to(device), labels.to(device))
            parts.append((loss_BT.float().cpu().numpy(), (labels != IGNORED).numpy()))
            (progress or Progress()).step(min(start + batch_size, len(share)), len(share), "windows")
    loss_WT, labelled_WT = (np.concatenate(column) for column in zip(*parts, strict=True))
    if distributed:
        loss_WT, labelled_WT = _gather(share, loss_WT, labelled_WT, len(windows))
    return loss_WT, labelled_WT


def _gather(share: np.ndarray, loss: np.ndarray, labelled: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, (share, loss, labelled))
    loss_WT, labelled_WT = (np.empty((count, x.shape[1]), dtype=x.dtype) for x in (loss, labelled))
    for rows, part_loss, part_labelled in shares:
        loss_WT[rows], labelled_WT[rows] = part_loss, part_labelled
    return loss_WT, labelled_WT
