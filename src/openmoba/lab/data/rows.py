"""Rows of JSON, CSV, Parquet and Arrow files, one column of them, read row by row.

Memory is bounded by the longest row, and for Parquet and Arrow by some rows.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from openmoba.lab.data.files import open_lines

_ROWS_AT_ONCE = 16
_CHARACTERS_AT_ONCE = 1 << 20


class Row(NamedTuple):
    """One value of a column, the number of its row from 1, and the share of the file read by then."""

    number: int
    value: Any
    share: float


def read_rows(path: Path, kind: str, column: str) -> Iterator[Row]:
    """Yield the values of a column; None in rows that have none.

    Args:
        kind: a value of `KINDS`.

    Raises:
        ValueError: no such column, or not readable as `kind`, with file and row.
    """
    return _READERS[kind](path, column)


def _json(path: Path, column: str) -> Iterator[Row]:
    """Yield the objects of lines, or of a list."""
    with open_lines(path) as (stream, share):
        start, blank = stream.read(1), 0
        while start.isspace():
            start, blank = stream.read(1), blank + (start == "\n")
        rows = _listed(path, stream) if start == "[" else _lines(path, start, stream, blank + 1)
        first = True
        for number, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number}: a row is an object with columns, got {row!r:.60}")
            if first and column not in row:
                raise no_column(path, column, list(row))
            first = False
            yield Row(number, row.get(column), share())


def _lines(path: Path, start: str, stream: TextIO, first: int) -> Iterator[tuple[int, Any]]:
    """Yield the objects of lines, of which the first has this number, and its first character was read."""
    for number, line in enumerate(stream, first):
        whole = start + line if number == first else line
        if not whole.strip():
            continue
        try:
            yield number, json.loads(whole)
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}, row {number} is not readable as JSON: {error}; a file holds an object on each line, or a "
                "list of objects"
            ) from error


def _listed(path: Path, stream: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the objects of a list, of which a megabyte is held, or one."""
    decoder = json.JSONDecoder()
    text, at, number = "", 0, 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            if text[at + 1 :].strip() or any(line.strip() for line in stream):
                raise ValueError(
                    f"{path} goes on behind its list of {number - 1} objects; a file holds one list of objects, or an "
                    "object on each line"
                )
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except _UNREADABLE as error:
            more = stream.read(max(_CHARACTERS_AT_ONCE, len(text) - at))
            if not more:
                raise ValueError(f"{path}, row {number} is not readable as JSON: {error}") from error
            text, at = text[at:] + more, 0
        else:
            yield number, row
            number += 1


_BETWEEN = re.compile(r"[\s,]*")
_UNREADABLE = (ValueError, RecursionError)
"""What a JSON reader raises: the second where lists or objects lie too deep in each other."""


def _csv(path: Path, column: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # 128 KB otherwise
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    with open_lines(path) as (stream, share):
        rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
        _check_column(path, column, list(rows.fieldnames or []))
        try:
            for number, row in enumerate(rows, 1):
                if None in row:
                    raise ValueError(f"{path}, row {number} has more fields than the first line names")
                yield Row(number, row[column], share())
        except csv.Error as error:
            raise ValueError(f"{path} is not readable as CSV behind line {rows.line_num}: {error}") from error


def _parquet(path: Path, column: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column])
            yield from _of_batches(batches, column, lambda rows, _: rows / file.metadata.num_rows)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not readable as Parquet: {error}") from error


def _arrow(path: Path, column: str) -> Iterator[Row]:
    """Yield from files of `datasets`, which are streams, and from those of Arrow and Feather."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            magic = mapped.read(6)
            mapped.seek(0)
            if magic == b"ARROW1":
                file = pyarrow.ipc.open_file(mapped)
                _check_column(path, column, file.schema.names)
                count = file.num_record_batches
                yield from _of_batches(map(file.get_batch, range(count)), column, lambda _, batch: batch / count)
            else:
                stream = pyarrow.ipc.open_stream(mapped)
                _check_column(path, column, stream.schema.names)
                yield from _of_batches(stream, column, lambda *_: mapped.tell() / mapped.size())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not readable as Arrow: {error}") from error


def _of_batches(batches: Iterable[Any], column: str, share: Callable[[int, int], float]) -> Iterator[Row]:
    """Yield the rows of batches; `share` is of this many rows, of this many batches."""
    number = 0
    for place, batch in enumerate(batches, 1):
        for value in batch.column(column):
            number += 1
            yield Row(number, value.as_py(), share(number, place))


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise no_column(path, column, names)
    if names.count(column) > 1:
        raise ValueError(f"{path} has {names.count(column)} columns {column!r}; rename all but one")


def no_column(path: Path, column: str, names: list[str]) -> ValueError:
    """Make the error that a file has other columns."""
    return ValueError(f"{path} has no column {column!r}; set data.column to one of {', '.join(names)}")


KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
}
"""Suffix of a file of rows -> what it is."""

_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "JSON": _json,
    "CSV": _csv,
    "Parquet": _parquet,
    "Arrow": _arrow,
}
