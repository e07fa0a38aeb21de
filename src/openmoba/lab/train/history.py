"""The records of a run: written in few bytes, and read as a whole, none missing, none twice.

Numbers are written to six digits, and what an evaluation found in every window and range is packed, since a study has
thousands of lines. Charts and comparisons are made of these rows, and a resumed run adds to them. A lost line would
change a number without a word, so each missing one, as far as checkpoint or result says, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from openmoba.lab.config import RunConfig, from_dict
from openmoba.lab.run_files import METRICS_FILE, RESULT_FILE
from openmoba.records import disk
from openmoba.records.compact import pack, rounded, unpack
from openmoba.records.disk import Row

PACKED = ("positions", "contexts")
"""Of the losses of every window, what is packed: several for each window."""


def record(folder: Path, row: Row) -> None:
    """Add a record to those of the run in `folder`, on the disk when this returns."""
    disk.append(folder / METRICS_FILE, _packed(rounded(row)))


def keep(folder: Path, rows: Iterable[Row]) -> None:
    """Replace the records of the run in `folder` by `rows`, some of what `history` read."""
    disk.keep(folder / METRICS_FILE, map(_packed, rows))


def history(folder: Path) -> list[Row]:
    """Read all records of the run in `folder`, in order.

    Raises:
        ValueError: a line is no record of training or evaluation.
    """
    path = folder / METRICS_FILE
    rows = disk.read(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, line {number}"
        disk.expect(row, {"kind": str, "step": int}, where)
        if row["kind"] not in _SHAPES:
            raise ValueError(f"{where}: unknown kind {row['kind']!r}, not {' or '.join(_SHAPES)}; restore the file")
        disk.expect(row, _SHAPES[row["kind"]], where)
        windows = row.get("windows", {})
        windows |= {name: unpack(windows[name], f"{where}: windows: {name}") for name in PACKED if name in windows}
    return rows


def history_until(folder: Path, config: RunConfig, step: int) -> list[Row]:
    """Read the records of the run in `folder` up to `step`, a step with a checkpoint.

    Raises:
        ValueError: one of them is missing or there twice.
    """
    path, train = folder / METRICS_FILE, config.train
    rows = [row for row in history(folder) if row["step"] <= step]
    wanted = {
        "train": {*range(train.log_every, step + 1, train.log_every), *({step} & {train.steps})},
        "eval": {evaluated for evaluated in config.evaluation_steps if evaluated <= step},
    }
    for kind, steps in wanted.items():
        _check(path, kind, [row["step"] for row in rows if row["kind"] == kind], steps, f"{folder} is at step {step}")
    return rows


def read_result(folder: Path) -> tuple[RunConfig, Row]:
    """Read configuration and result of the finished run in `folder`.

    Raises:
        ValueError: no result, or not that of a run.
    """
    path = folder / RESULT_FILE
    result = disk.read_json(path)
    disk.expect(result, _RESULT, str(path))
    try:
        return from_dict(RunConfig, result["config"]), result
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def evaluations(folder: Path, config: RunConfig, result: Row) -> list[Row]:
    """Read the evaluations of the finished run in `folder`, in order.

    Raises:
        ValueError: one is missing or there twice, or the last is not that of the result or lacks its windows.
    """
    path, final = folder / METRICS_FILE, result["eval"]
    rows = [row for row in history(folder) if row["kind"] == "eval"]
    finished = f"{folder / RESULT_FILE} is of step {final['step']}"
    _check(path, "eval", [row["step"] for row in rows], set(config.evaluation_steps), finished)
    unlike = [name for name in ("step", "lm_loss") if rows[-1][name] != final[name]]
    if unlike:
        raise ValueError(
            f"{path}: the evaluation of step {rows[-1]['step']} says {unlike[0]}={rows[-1][unlike[0]]}, "
            f"{folder / RESULT_FILE} {final[unlike[0]]}; {_WAY_OUT.format(folder=folder)}"
        )
    disk.expect(rows[-1], _FINAL, f"{path}: the evaluation of step {final['step']}")
    return rows


def _packed(row: Row) -> Row:
    windows = row.get("windows", {})
    packed = {name: pack(windows[name]) for name in PACKED if name in windows}
    return {**row, "windows": windows | packed} if packed else row


def _check(path: Path, kind: str, found: list[int], wanted: set[int], because: str) -> None:
    """Raise ValueError unless `found` are in order, each once, and all that are `wanted` among them."""
    way_out = _WAY_OUT.format(folder=path.parent)
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f"{path} lacks the {_KINDS[kind]} of step {missing[0]}, though {because}; {way_out}")
    for before, step in pairwise(found):
        if step <= before:
            raise ValueError(f"{path}: the {_KINDS[kind]} of step {step} comes after that of step {before}; {way_out}")


_KINDS = {"train": "record of training", "eval": "evaluation"}
_WAY_OUT = "restore the file, or delete the folder {folder} to train the run again"

# What whoever reads these files relies on; an expectation is a type, or a table of them.
_SHAPES: Mapping[str, Any] = {
    "train": {"loss": float, "seconds": float, "compute": {"accelerator_seconds": float}},
    "eval": {
        "lm_loss": float,
        "trailing_loss": float | None,
        "position_loss": list,
        "compute": {"accelerator_seconds": float},
    },
}
_FINAL: Mapping[str, Any] = {"intervals": dict, "windows": {"lm": list, "trailing": list}}
_RESULT: Mapping[str, Any] = {
    "config": dict,
    "params": {"total": int, "non_embedding": int},
    "tokens": int,
    "eval": {"step": int, "lm_loss": float, "trailing_loss": float | None},
    "data": {"vocabulary": int},
    "hardware": {"cpu": str, "gpus": list},
    "versions": dict,
    "seconds": float,
}
