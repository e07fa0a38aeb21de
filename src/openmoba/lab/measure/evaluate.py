"""Evaluation: LM loss, position-wise loss and trailing loss, with intervals over documents and their windows.

    LM loss         mean cross-entropy in nats over all labelled positions of the windows
    position-wise   the same by range of positions
    trailing        mean over the last positions of the windows that reach the full length

Windows come from inside single documents (`openmoba.lab.data.windows`).
"""

# W windows, T positions

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from openmoba.lab.config import DataConfig, EvalConfig, RunConfig, stored_config
from openmoba.lab.data.identity import OTHER_DOCUMENTS, known_of_run
from openmoba.lab.data.load import data_of_run, load_validation, validation_windows
from openmoba.lab.data.windows import Windows
from openmoba.lab.measure.contexts import context_losses
from openmoba.lab.measure.losses import Sums, TokenLosses, window_losses
from openmoba.lab.model.build import check_positions, load_model, model_folder
from openmoba.lab.model.loss import attach_loss
from openmoba.lab.progress import Progress
from openmoba.lab.run_files import is_run
from openmoba.records.disk import Row


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
    known = known_of_run(source, data, OTHER_DOCUMENTS, progress or Progress())
    with model_folder(source, progress) as folder:
        check_positions(folder, data.length, progress)
        model = load_model(folder)
        windows = validation_windows(load_validation(data, folder, progress, known=known), settings.windows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attach_loss(model)
    model.to(device).eval()
    with autocast(device, bf16=device.type == "cuda"):
        return measure(model, windows, checked, device, progress)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Enter bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def measure(
    losses: TokenLosses,
    windows: Windows,
    config: RunConfig,
    device: torch.device,
    progress: Progress | None = None,
    *,
    each_window: bool = True,
) -> Row:
    """Measure what an evaluation of a run of `config` does: `summary`, and with `each_window` `eval.contexts` too.

    These are `context_loss`, a list of `context`, `loss` and `interval`, and under `windows` `contexts`, a list with
    the loss of each context for every window, None where it does not reach the full length.
    """
    size = config.eval.batch_size
    measured = window_losses(losses, windows, size, device, progress)
    row = summary(*measured, windows, config.trailing, config.position_range, each_window=each_window)
    contexts = config.eval.contexts if each_window and windows.full.any() else ()
    if contexts:
        cut = context_losses(losses, windows, contexts, config.trailing, size, device, progress)
        row["context_loss"] = [
            {"context": context, "loss": sums.mean, "interval": sums.bounds} for context, sums in cut.items()
        ]
        row["windows"]["contexts"] = [list(each) for each in zip(*(sums.each for sums in cut.values()), strict=True)]
    return row


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
    length, document_W = loss_WT.shape[1], windows.documents

    def part(start: int, end: int, among_W: np.ndarray | int = 1) -> Sums:
        total_W, count_W = (x[:, start:end].sum(1) for x in (loss_WT.astype(np.float64), labelled_WT))
        return Sums(total_W * among_W, count_W * among_W, document_W)

    named = {"lm": part(0, length), "trailing": part(length - trailing, length, windows.full)}
    spans = [(start, min(start + position_range, length)) for start in range(0, length, position_range)]
    ranges = {span: sums for span in spans if (sums := part(*span)).mean is not None}
    row: Row = {f"{name}_loss": sums.mean for name, sums in named.items()}
    row["position_loss"] = [{"start": start, "end": end, "loss": sums.mean} for (start, end), sums in ranges.items()]
    row["trailing"] = trailing
    if each_window:
        for entry, sums in zip(row["position_loss"], ranges.values(), strict=True):
            entry["interval"] = sums.bounds
        row["intervals"] = {name: sums.bounds for name, sums in named.items()}
        row["windows"] = {"document": document_W.tolist()} | {name: sums.each for name, sums in named.items()}
        row["windows"]["positions"] = [list(each) for each in zip(*(s.each for s in ranges.values()), strict=True)]
    return row
