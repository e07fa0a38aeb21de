"""Documents written as Parquet: columns `id` and `text`, zstd, memory bounded by some documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_CHARACTERS_PER_GROUP = 32_000_000


def write_documents(path: Path, documents: Iterable[tuple[str, str]], level: int) -> None:
    """Write documents, each an id and a text. A file that is there is replaced when all are in.

    Args:
        level: of zstd, 1 to 22.

    Raises:
        ValueError: the file cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string())])
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A column of one page per group, so that documents are compressed with those before them.
        with parquet.ParquetWriter(
            partial, schema, compression="zstd", compression_level=level, use_dictionary=False
        ) as writer:
            for group in _groups(documents):
                writer.write_table(pyarrow.table(group, schema=schema), row_group_size=len(group["id"]))
        partial.rename(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)


def _groups(documents: Iterable[tuple[str, str]]) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of some documents at a time."""
    group: dict[str, list[Any]] = {"id": [], "text": []}
    size = 0
    for name, text in documents:
        group["id"].append(name)
        group["text"].append(text)
        size += len(text)
        if size >= _CHARACTERS_PER_GROUP:
            yield group
            group, size = {"id": [], "text": []}, 0
    if group["id"]:
        yield group
