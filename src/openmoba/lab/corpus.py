"""Documents: where they come from, and what identifies them.

A document is a text, or a conversation: a list of messages `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

Document = str | list[dict[str, str]]

# Folders of the standard library that hold no library code.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Corpus(Protocol):
    """Documents in a fixed order."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def digest(self) -> str:
        """Hash of the contents, hexadecimal: the same wherever the files lie and whenever they were written."""

    def named(self) -> Iterator[tuple[str, Document]]:
        """The documents that hold something, with their names, in order."""

    def documents(self) -> Iterator[Document]:
        """The documents alone."""


@dataclass(frozen=True)
class FileCorpus:
    """Documents that are files, or rows of files.

    Attributes:
        name: as the user gave it.
        files: the files that hold the documents; their contents identify the corpus.
        kind: "text" (one file is one document), or the `datasets` builder "json", "parquet", "arrow".
        column: of the document, where `kind` has columns.
    """

    name: str
    files: tuple[Path, ...]
    kind: str
    column: str

    @cached_property
    def digest(self) -> str:
        """Hash of the contents."""
        digest = hashlib.blake2b(f"{self.kind} {self.column}".encode(), digest_size=16)
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """All documents that hold something, in order."""
        return (document for _, document in self.named())

    def named(self) -> Iterator[tuple[str, Document]]:
        """The documents with their names: a file's path below the folder of all files, or a row's number."""
        if self.kind == "text":
            folder = os.path.commonpath([path.parent for path in self.files])
            rows = ((path.relative_to(folder).as_posix(), _read_text(path)) for path in self.files)
        else:
            rows = ((str(number), row) for number, row in enumerate(self._rows()))
        return ((name, row) for name, row in rows if row)

    def _rows(self) -> Iterator[Any]:
        rows = load_rows(self.kind, [str(path) for path in self.files])
        if self.column not in rows.column_names:
            raise ValueError(
                f"{self.name} has no column {self.column!r}; set data.column to one of {', '.join(rows.column_names)}"
            )
        return (row[self.column] for row in rows.select_columns([self.column]))


def open_corpus(source: str, column: str = "text") -> FileCorpus:
    """The corpus that `source` names: "stdlib", a file, a folder, or a data set on the hub.

    Raises:
        ValueError: there is no such corpus, or nothing in it.
    """
    path = Path(source).expanduser()
    if source == "stdlib":
        files, kind = _standard_library(), "text"
    elif path.is_dir():
        files, kind = _folder(path)
    elif path.is_file():
        files, kind = [path], _kind(path)
    elif path.suffix in _KINDS or source.startswith(("/", ".", "~")):
        raise ValueError(f"{source} does not exist")
    else:
        files, kind = _hub_files(source), "arrow"
    if not files:
        raise ValueError(f"{source} holds no text, .jsonl or .parquet files")
    return FileCorpus(source, tuple(files), kind, column)


def load_rows(kind: str, files: list[str]) -> Any:
    """The `datasets.Dataset` of the files, memory-mapped."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, data_files=files, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{files[0]} is not readable as {kind}: {error.__cause__ or error}") from error
    except StopIteration:  # as it says that there is no first row
        raise ValueError(f"{files[0]} holds no rows; set data.source or data.valid to other documents") from None


_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def _kind(path: Path) -> str:
    return _KINDS.get(path.suffix, "text")


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if not _NOT_LIBRARY & set(path.relative_to(root).parts)]


def _folder(folder: Path) -> tuple[list[Path], str]:
    """The folder's Parquet files, else its JSON lines, else everything in it that is text."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _hidden(p.relative_to(folder))]
    for suffix in (".parquet", ".jsonl"):
        if matching := [path for path in paths if path.suffix == suffix]:
            return matching, _KINDS[suffix]
    return [path for path in paths if _is_text(path)], "text"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096)
    return bool(head) and b"\0" not in head


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _hub_files(source: str) -> list[Path]:
    """Arrow files of a hub data set `NAME[@CONFIG][:SPLIT]` in the local cache, downloaded where missing."""
    import datasets

    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(f"{source!r} is no file, and not readable as a data set of the hub: {error}") from error
    return [Path(entry["filename"]) for entry in rows.cache_files]
