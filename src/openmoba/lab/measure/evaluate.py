"""Evaluation: LM loss, position-wise loss and trailing loss, with intervals over documents and their windows.

    LM loss         mean cross-entropy in nats over all labelled positions of the windows
    position-wise   the same by range of positions
    trailing        mean over the last positions of the windows that reach the full length

Windows come from inside single documents (`openmoba.lab.data.windows`).
"""

# W windows, T positions

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmoba.lab.config import DataConfig, EvalConfig, RunConfig, default_range, is_run, stored_config
from openmoba.lab.data.identity import OTHER_DOCUMENTS, known_of_run
from openmoba.lab.data.load import data_of_run, load_validation, validation_windows
from openmoba.lab.data.windows import IGNORED, Windows
from openmoba.lab.measure.resample import mean_interval
from openmoba.lab.model.build import load_model, model_folder
from openmoba.lab.model.loss import attach_loss
from openmoba.lab.progress import Progress

Row = dict[str, Any]
Sums = dict[str | int, tuple[np.ndarray, np.ndarray]]
"""Part of the windows -> sums of losses and numbers of labels, each `[W]`; a range's name is its start."""
TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""(input_ids, labels) -> loss per token; a model after `attach_loss` is one."""


def evaluate_source(
    source: str,
    data: DataConfig | None = None,
    evaluation: EvalConfig | None = None,
    progress: Progress | None = None,
) -> Row:
    """Evaluate a run's newest checkpoint, a model's folder or a model of the hub, with the attention saved in it.

    Args:
        data, evaluation: None for those of the run; for a model, the defaults.

    Raises:
        ValueError: no readable model, or settings that do not fit each other.
    """
    own = stored_config(source) if is_run(source) else RunConfig()
    if data is None:
        data = data_of_run(source) if is_run(source) else own.data
    settings = replace(evaluation or own.eval, every=None, count=None)  # when a run evaluates is its own matter
    checked = RunConfig(data=data, eval=settings)
    checked.check()
    evaluation = checked.eval
    known = known_of_run(source, data, OTHER_DOCUMENTS, progress or Progress())
    with model_folder(source, progress) as folder:
        model = load_model(folder)
        windows = validation_windows(load_validation(data, folder, progress, known=known), evaluation.windows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attach_loss(model)
    model.to(device).eval()
    with autocast(device, bf16=device.type == "cuda"):
        loss_WT, labelled_WT = window_losses(model, windows, evaluation.batch_size, device, progress)
    default = default_range(data.length)
    return summary(
        loss_WT,
        labelled_WT,
        windows,
        evaluation.trailing or default,
        evaluation.position_range or default,
    )


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Enter bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def window_losses(
    losses: TokenLosses,
    windows: Windows,
    batch_size: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return every position's loss, float32 `[W, T]`, 0 where not labelled, and the labelled, bool `[W, T]`.

    Under torchrun, each process computes a share of the windows and all get the whole.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
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
        loss_WT, labelled_WT = _gather(share, loss_WT, labelled_WT, len(windows), world)
    return loss_WT, labelled_WT


def summary(
    loss_WT: np.ndarray,
    labelled_WT: np.ndarray,
    windows: Windows,
    trailing: int,
    position_range: int,
    *,
    each_window: bool = True,
) -> Row:
    """Return the part of an evaluation record that follows from the losses.

    Returns:
        `lm_loss`, `trailing_loss` (None without full windows), `position_loss` by range (those that have labels),
        `trailing`. With `each_window` also 95 % intervals, under `intervals` and in the ranges, and under `windows`
        the means of each window to six digits: `document` (the number of the document it comes from), `lm`,
        `trailing` (None where it does not reach the full length), and `positions`, a list with the loss of each
        range of `position_loss` (None without labels there).
    """
    length = loss_WT.shape[1]
    starts = range(0, length, position_range)
    parts: dict[str | int, slice] = {start: slice(start, start + position_range) for start in starts}
    parts |= {"lm": slice(None), "trailing": slice(length - trailing, length)}
    sums: Sums = {
        name: (loss_WT[:, part].sum(1, dtype=np.float64), labelled_WT[:, part].sum(1)) for name, part in parts.items()
    }
    total_W, count_W = sums["trailing"]
    sums["trailing"] = (total_W * windows.full, count_W * windows.full)
    ranges = [
        {"start": start, "end": min(start + position_range, length), "loss": loss}
        for start in starts
        if (loss := _mean(*sums[start])) is not None
    ]
    row = {
        "lm_loss": _mean(*sums["lm"]),
        "trailing_loss": _mean(*sums["trailing"]),
        "position_loss": ranges,
        "trailing": trailing,
    }
    return row | _each_window(sums, ranges, windows.documents) if each_window else row


def _each_window(sums: Sums, ranges: list[Row], document_W: np.ndarray) -> Row:
    positions = [_window_means(*sums[part["start"]]) for part in ranges]
    return {
        "position_loss": [part | {"interval": _bounds(*sums[part["start"]], document_W)} for part in ranges],
        "intervals": {name: _bounds(*sums[name], document_W) for name in ("lm", "trailing")},
        "windows": {
            "document": document_W.tolist(),
            "lm": _window_means(*sums["lm"]),
            "trailing": _window_means(*sums["trailing"]),
            "positions": [list(means) for means in zip(*positions, strict=True)],
        },
    }


def _window_means(total_W: np.ndarray, count_W: np.ndarray) -> list[float | None]:
    return [float(f"{total / count:.6g}") if count else None for total, count in zip(total_W, count_W, strict=True)]


def _bounds(total_W: np.ndarray, count_W: np.ndarray, document_W: np.ndarray) -> list[float] | None:
    interval = mean_interval(total_W, count_W, document_W)
    return None if interval is None else [interval.low, interval.high]


def _mean(total_W: np.ndarray, count_W: np.ndarray) -> float | None:
    return float(total_W.sum() / count_W.sum()) if count_W.sum() else None


def _gather(
    share: np.ndarray, loss: np.ndarray, labelled: np.ndarray, count: int, world: int
) -> tuple[np.ndarray, np.ndarray]:
    shares: list[Any] = [None] * world
    torch.distributed.all_gather_object(shares, (share, loss, labelled))
    loss_WT, labelled_WT = (np.empty((count, x.shape[1]), dtype=x.dtype) for x in (loss, labelled))
    for rows, part_loss, part_labelled in shares:
        loss_WT[rows], labelled_WT[rows] = part_loss, part_labelled
    return loss_WT, labelled_WT
