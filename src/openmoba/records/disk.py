"""Records of a run: JSON lines that survive a kill, and JSON files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from openmoba.errors import way_out

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add one line to `path`, on the disk when this returns; a torn last line of a killed writer is cut off.

    Raises:
        ValueError: the row holds NaN or infinity, or the disk does not take it.
    """
    append_lines(path, _encode(row, path) + b"\n")


def append_lines(path: Path, lines: bytes, head: bytes = b"") -> None:
    """Add whole lines to `path`, on the disk when this returns; a torn last line of a killed writer is cut off.

    Args:
        head: lines that a file begins with.

    Raises:
        ValueError: the disk does not take it.
    """
    with _writing(path), path.open("ab+") as file:
        whole = _cut_torn_line(file.fileno())
        try:
            file.write(lines if whole else head + lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), whole)
            raise


def whole_lines(path: Path) -> bytes:
    """Read `path` up to its last newline, what follows being torn; a missing file has none."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def read(path: Path) -> list[Row]:
    """Read all whole lines of `path`; a torn last line is skipped, a missing file has none.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    rows = []
    for number, line in enumerate(whole_lines(path).split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a record; delete the line and what follows it")
        rows.append(row)
    return rows


def keep(path: Path, rows: Iterable[Row]) -> None:
    """Replace `path` by `rows` in one step, as when a resumed run drops what came after its checkpoint."""
    write_bytes(path, b"".join(_encode(row, path) + b"\n" for row in rows))


def write_json(path: Path, value: Row) -> None:
    """Write `path` in one step: a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(_finite(value, path), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `path` in one step, UTF-8."""
    write_bytes(path, text.encode())


def read_json(path: Path) -> Row:
    """Read the JSON object in `path`; ValueError if it is missing or is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it or restore it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def restore(files: Mapping[Path, bytes | None]) -> None:
    """Give each file the content that it had; None removes it."""
    for path, content in files.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, content)


def remove_leftovers(folder: Path) -> None:
    """Remove what a writer that was killed left in `folder`: files written aside by a process that is no more."""
    for path in folder.glob(".*"):
        name, _, process = path.name.rpartition(".")
        if name.strip(".") and process.isdecimal() and path.is_file() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def expect(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError, with the place of what is wrong, unless `value` has the types of `shape` at its places.

    Args:
        shape: a type, of which float takes whole numbers too, or a table of such shapes; more keys may be there.
    """
    if not isinstance(shape, Mapping):
        kinds = shape | int if float in (shape, *get_args(shape)) else shape
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where} is not {_say(shape)} but {value!r:.40}; restore the file from a copy")
        return
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a table but {value!r:.40}; restore the file from a copy")
    for key, inner in shape.items():
        if key not in value:
            raise ValueError(f"{where} has no {key!r}; restore the file from a copy")
        expect(value[key], inner, f"{where}: {key}")


def _say(kind: Any) -> str:
    return " or ".join(getattr(option, "__name__", str(option)) for option in get_args(kind) or (kind,))


def _encode(row: Row, path: Path) -> bytes:
    return json.dumps(_finite(row, path), ensure_ascii=False, separators=(",", ":")).encode()


def _finite(value: Any, path: Path, name: str = "") -> Any:
    """Return `value`; a ValueError names the number in it which is none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {name}={value} is no number that JSON can hold")
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        _finite(child, path, f"{name}.{key}".strip("."))
    return value


def _cut_torn_line(file: int) -> int:
    """Drop what follows the last newline of the open file `file`, and return the bytes that are left."""
    size = os.fstat(file).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return end


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusal into one clear error."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; {way_out(error)}, earlier records are safe"
        ) from error
