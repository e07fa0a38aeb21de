"""Files of a folder: which are taken, which are left out and why, and how they are opened."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from openmoba.lab.data.rules import FileRules


@dataclass(frozen=True)
class LeftOut:
    """Files that a source has and its documents do not, by reason."""

    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Note that the file at `path` is left out."""
        self.paths.setdefault(reason, []).append(path)

    def __str__(self) -> str:
        """Count the files of each reason and name some, in a sentence, or in none."""
        parts = [f"{len(paths)} {reason} ({some(paths)})" for reason, paths in self.paths.items()]
        return f"left out: {'; '.join(parts)}" if parts else ""


def some(names: list[str]) -> str:
    """Name the first, and write dots if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class NotTextError(ValueError):
    """A file that does not hold text; the message says why."""


def walk(folder: Path, rules: FileRules, left_out: LeftOut) -> Iterator[tuple[str, Path]]:
    """Yield the files that the rules take: path below the folder, with slashes, and path, in their order."""
    for path in sorted(_visible(folder, left_out)):
        below = path_below(path, folder)
        if not path.is_file():
            left_out.add("no file", below)
        elif reason := rules.why_not(below, path.stat().st_size):
            left_out.add(reason, below)
        else:
            yield below, path


def _visible(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield all files below the folder but those that are hidden, or in a folder hidden or elsewhere."""

    def leave(reason: str, path: str | Path) -> None:
        left_out.add(reason, path_below(Path(path), folder))

    for here, folders, names in os.walk(folder, onerror=lambda error: leave("not readable", error.filename)):
        for name in [*folders, *names]:
            if _is_hidden(name):
                leave("hidden", Path(here, name))
            elif name in names:
                yield Path(here, name)
            elif Path(here, name).is_symlink():
                leave("a link to a folder", Path(here, name))
        folders[:] = [name for name in folders if not _is_hidden(name)]


def path_below(path: Path, folder: Path) -> str:
    """Write a path below a folder with slashes; bytes of it that are no UTF-8, as old archives have, like \\xe9."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
"""Suffixes of compressed files that are read as what they hold."""


def suffix_of(path: Path) -> str:
    """Return what the name says that the file holds, in lower case: ".jsonl" of `a.JSONL.gz`."""
    name = PurePosixPath(path.name.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], float]]]:
    """Open a file's bytes, decompressed where it is compressed, and tell the share read so far.

    Raises:
        ValueError: the file is damaged, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = max(1, path.stat().st_size)
            yield _decompressed(file), lambda: file.tell() / size
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {error}; restore it, or leave it out") from error


def _decompressed(file: BinaryIO) -> BinaryIO:
    """Decompress, as the first bytes say, since names may be wrong."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(file))
    if head == b"\xfd7zXZ\0":
        return cast(BinaryIO, lzma.LZMAFile(file))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))
    return file


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[io.TextIOWrapper, Callable[[], float]]]:
    """Open a file's UTF-8 text, compressed or not, to be read bit by bit, and tell the share read so far.

    Raises:
        ValueError: the file is damaged, cannot be read, or holds no text in UTF-8.
    """
    with open_bytes(path) as (stream, share):
        try:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), share
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} holds no text in UTF-8: {error}; convert it") from error


def read_text(path: Path) -> str:
    """Read a file's UTF-8 text, compressed or not, with lines that end in `\n`.

    Raises:
        NotTextError: another encoding, or no text at all.
        ValueError: the file is damaged, or cannot be read.
    """
    if path.suffix.lower() == ".ipynb":
        raise NotTextError("a notebook, which is JSON")
    with open_bytes(path) as (stream, _):
        content = stream.read()
    if content.startswith(b"%PDF-"):
        raise NotTextError("PDF")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise NotTextError("in UTF-16, not UTF-8")
    if b"\0" in content:
        raise NotTextError("binary")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError("in another encoding than UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
