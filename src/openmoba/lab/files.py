"""Files of a folder: which are taken, which are left out and why, and their texts."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class FileRules:
    """Which files of a folder are taken. Hidden files and `__pycache__` never are."""

    suffixes: tuple[str, ...] = ()
    """Endings of the names of the files taken, such as .c .h; left out: any."""
    exclude: tuple[str, ...] = ()
    """Folders and files left out, as paths below the source."""
    smallest_file: int = 1
    """Files of fewer bytes are left out."""
    largest_file: int | None = None
    """Files of more bytes are left out; not given: none."""

    def __post_init__(self) -> None:
        for name, lowest in (("smallest_file", 1), ("largest_file", self.smallest_file)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be >= {lowest} bytes, got {value}")

    def why_not(self, path: str, size: int) -> str | None:
        """Why the file of `size` bytes at `path`, below the folder, is left out; None if it is taken."""
        parts = PurePosixPath(path).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts):
            return "hidden"
        if any(parts[: len(PurePosixPath(left).parts)] == PurePosixPath(left).parts for left in self.exclude):
            return "excluded"
        if self.suffixes and PurePosixPath(path).suffix not in self.suffixes:
            return "another suffix"
        if size < self.smallest_file:
            return "empty" if size == 0 else f"below {self.smallest_file} bytes"
        if self.largest_file is not None and size > self.largest_file:
            return f"above {self.largest_file} bytes"
        return None


@dataclass(frozen=True)
class LeftOut:
    """Files that a source has and its documents do not, by reason."""

    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Note that the file at `path` is left out."""
        self.paths.setdefault(reason, []).append(path)

    def __str__(self) -> str:
        """A sentence that counts the files of each reason and names some, or nothing."""
        parts = [
            f"{len(paths)} {reason} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
            for reason, paths in self.paths.items()
        ]
        return f"left out: {'; '.join(parts)}" if parts else ""


class NotTextError(ValueError):
    """A file that does not hold text; the message says why."""


def walk(folder: Path, rules: FileRules, left_out: LeftOut) -> Iterator[tuple[str, Path]]:
    """Path below the folder, with slashes, and path of each file that the rules take, in order of the paths."""
    for path in sorted(Path(here, name) for here, _, names in os.walk(folder) for name in names):
        below = path.relative_to(folder).as_posix()
        if not path.is_file():
            left_out.add("no file", below)
        elif reason := rules.why_not(below, path.stat().st_size):
            left_out.add(reason, below)
        else:
            yield below, path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with lines that end in `\\n`.

    Raises:
        NotTextError: another encoding, or no text at all.
    """
    return decode(path.read_bytes())


def decode(content: bytes) -> str:
    """The text of bytes in UTF-8, without byte order mark, with lines that end in `\\n`.

    Raises:
        NotTextError: another encoding, or no text at all.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise NotTextError("in UTF-16, not UTF-8")
    if b"\0" in content:
        raise NotTextError("binary")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError("in another encoding than UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
