"""Rows of a CSV file that grows row by row and survives a kill; a kind of row is a frozen dataclass."""

from __future__ import annotations

import csv
import io
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from openmoba.records.disk import append_lines, whole_lines
from openmoba.records.markdown import table


@dataclass(frozen=True)
class CsvRow:
    """One row. Its fields are the columns, of type int, float, bool or str, or None for an empty cell.

    Attributes:
        p20_ms, p50_ms, p80_ms: quantiles of `samples` timings.
        error: why there is no result.
        device, power_limit_w, torch, triton, openmoba, commit: what it was measured on (`openmoba.bench.machine`).
        time: when, in UTC.
    """

    _: KW_ONLY
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    error: str | None = None
    device: str | None = None
    power_limit_w: float | None = None
    torch: str | None = None
    triton: str | None = None
    openmoba: str | None = None
    commit: str | None = None
    time: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float):  # as many digits as the file keeps, so that a row read back is the same
                object.__setattr__(self, name, float(f"{value:.6g}"))

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """What was measured, where, and of which commit: a row with the same key need not be measured again."""


R = TypeVar("R", bound=CsvRow)


def columns(kind: type[CsvRow]) -> list[str]:
    """List the names of the columns, those of all kinds last."""
    common = [field.name for field in fields(CsvRow)]
    return [field.name for field in fields(kind) if field.name not in common] + common


def read_columns(path: Path) -> list[str]:
    """Read the names of a file's columns; none without it."""
    return next(csv.reader(_open(path)), [])


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Read the whole rows of `path`, its columns in any order; a torn last one is left out, a missing file has none.

    Raises:
        ValueError: the columns are not those of `kind`.
    """
    if sorted(read_columns(path)) not in ([], sorted(columns(kind))):
        raise ValueError(f"{path} has other columns than this version writes; give another file")
    types = {field.name: str(field.type) for field in fields(kind)}
    reader = csv.DictReader(_open(path))
    try:
        return [kind(**{name: _parse(text, types[name]) for name, text in row.items()}) for row in reader]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; restore the file, or give another") from error


def newest(rows: Sequence[R]) -> list[R]:
    """Keep the last row of every case on the last row's device; a run that ended early leaves older ones too."""

    last = {replace(row, commit=None).key: row for row in rows if row.device == rows[-1].device}
    return [row for row in rows if last.get(replace(row, commit=None).key) is row]


def append_row(path: Path, row: CsvRow) -> None:
    """Add one row, in the order of the file's columns, with these before the first; on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = read_columns(path) or columns(type(row))
    values = (getattr(row, name) for name in names)
    append_lines(path, _line("" if value is None else value for value in values), _line(names))


def length_name(tokens: int) -> str:
    """Name a length: 1536 -> "1536", 32768 -> "32K", 1048576 -> "1M"."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Write the lines of a table; columns without a value ("-") in all rows are left out."""
    kept = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    lines = [[line[i] for i in kept] for line in (head, *rows)]
    return table(lines[0], lines[1:])


def commits(rows: Iterable[CsvRow]) -> str:
    """Name the commits that rows come from."""
    return " and ".join(dict.fromkeys(short_commit(row.commit) for row in rows))


def short_commit(commit: str | None) -> str:
    """Shorten a commit to ten digits, and whether the files differed."""
    number, plus, changes = (commit or "unknown").partition("+")
    return number[:10] + plus + changes


def _open(path: Path) -> io.StringIO:
    return io.StringIO(whole_lines(path).decode())


def _line(cells: Iterable[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _parse(text: str, kind: str) -> Any:
    if text == "":
        return None
    if kind.startswith("bool"):
        return text == "True"
    if kind.startswith("int"):
        return int(text)
    return float(text) if kind.startswith("float") else text
