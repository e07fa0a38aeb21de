"""What of a source is taken: which files of a folder, and which documents."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import PurePosixPath

from openmoba.limits import check_count


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
        """Say why the file of `size` bytes at `path`, below the folder, is left out; None if it is taken."""
        parts = PurePosixPath(path).parts
        if any(parts[: len(PurePosixPath(left).parts)] == PurePosixPath(left).parts for left in self.exclude):
            return "excluded"
        if self.suffixes and PurePosixPath(path).suffix not in self.suffixes:
            return "with another suffix"
        if size < self.smallest_file:
            return "empty" if size == 0 else f"below {self.smallest_file} bytes"
        if self.largest_file is not None and size > self.largest_file:
            return f"above {self.largest_file} bytes"
        return None


@dataclass(frozen=True)
class DocumentRules:
    """Which documents are written, and how they are split."""

    smallest: int = 1
    """Documents of fewer bytes are left out."""
    hold_out: int | None = None
    """One of every this many documents is held out for validation, picked at random; not given: none."""
    largest: int | None = None
    """Training documents of more bytes are left out; not given: none."""
    total: int | None = None
    """Bytes of all training documents together at most, picked at random; not given: all."""
    cut: int | None = None
    """Validation documents end after this many bytes; not given: where they end."""
    seed: int = 0
    """Of the picking."""
    level: int = 9
    """Compression of the Parquet files by zstd, 1 to 22; more is smaller, and slower to write."""

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise ValueError(f"level is one of zstd's, 1 to 22, got {self.level}")
        for name, lowest in (("smallest", 1), ("hold_out", 2), ("largest", 1), ("total", 1), ("cut", 1), ("seed", 0)):
            check_count(name, getattr(self, name), lowest, sys.maxsize)
