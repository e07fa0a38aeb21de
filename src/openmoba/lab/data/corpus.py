"""Documents: where they come from, and what identifies them.

A document is a text, or a conversation: a list of messages, see `openmoba.lab.data.chat`.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from openmoba.hub import check_source
from openmoba.lab.data.chat import Messages, messages_of
from openmoba.lab.data.files import LeftOut, NotTextError, path_below, read_text, some, suffix_of, walk
from openmoba.lab.data.rows import KINDS, read_rows
from openmoba.lab.data.rules import FileRules
from openmoba.records.disk import read_json

Document = str | Messages

# Folders of the standard library that hold no library code.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

# Part of every corpus' digest: to be raised when the same files are read as other documents.
_READING = "2"


class Item(NamedTuple):
    """A document, None where a row has none; its name; and the share of the source read by then, 0 to 1."""

    name: str
    document: Document | None
    share: float


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
        name: what the user calls it.
        digest: hash of the contents, hexadecimal: the same wherever the files lie and whenever they were written.
        items: reads the source from its beginning.
        left_out: files of the source that are in no document.
    """

    name: str
    digest: str
    items: Callable[[], Iterator[Item]]
    left_out: LeftOut = field(default_factory=LeftOut)

    def named(self) -> Iterator[tuple[str, Document]]:
        """Return the documents that hold something, with their names, in order."""
        return ((item.name, item.document) for item in self.items() if item.document)

    def documents(self) -> Iterator[Document]:
        """Return the documents alone."""
        return (document for _, document in self.named())


def open_corpus(source: str, column: str = "text", rules: FileRules | None = None) -> Corpus:
    """Open what `source` names: "stdlib", a file, a folder, a pattern of files, or a data set on the hub.

    Args:
        column: of the documents, where files have columns.
        rules: which files of a folder are taken.

    Raises:
        ValueError: there is no such corpus, nothing in it, or files that are not readable as documents.
    """
    path = Path(source).expanduser()
    if source == "stdlib":
        return _of_texts(source, _standard_library())
    if path.is_dir():
        return _of_folder(source, path, column, rules or FileRules())
    if rules not in (None, FileRules()):
        raise ValueError(f"{source} is no folder, so there are no files to choose; leave the options for files out")
    if path.is_file():
        return _of_file(source, path, column)
    if "*" in source:
        files = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
        return _of_files(source, {_below(file, files): file for file in files}, column, LeftOut())
    if suffix_of(path) in KINDS:
        raise ValueError(f"{source} does not exist; give {_SOURCES}")
    check_source(source.partition(":")[0].partition("@")[0], _SOURCES)
    return _of_rows(source, {file.name: file for file in _hub_files(source)}, "Arrow", column)


_SOURCES = "a file, a folder, or NAME[@CONFIG][:SPLIT] of the hub"


def _of_file(source: str, path: Path, column: str) -> Corpus:
    if kind := KINDS.get(suffix_of(path)):
        return _of_rows(source, {path.name: path}, kind, column)
    corpus = _of_texts(source, {path.name: path})
    if corpus.left_out.paths:
        raise ValueError(
            f"{source} is {next(iter(corpus.left_out.paths))}; documents are text in UTF-8, JSON, CSV, Parquet or "
            "Arrow files, compressed by gzip, bzip2, xz or zstd or not"
        )
    return corpus


def _of_folder(source: str, folder: Path, column: str, rules: FileRules) -> Corpus:
    """Open a folder that `datasets` saved, or one of files."""
    if (folder / "dataset_dict.json").exists():
        splits = _saved(folder / "dataset_dict.json", "splits")
        raise ValueError(f"{source} holds the splits {', '.join(splits)}; set data.source to {folder / splits[0]}")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        names = [file["filename"] for file in _saved(folder / "state.json", "_data_files")]
        return _of_rows(source, {name: folder / name for name in names}, "Arrow", column)
    left_out = LeftOut()
    return _of_files(source, dict(walk(folder, rules, left_out)), column, left_out)


def _saved(path: Path, key: str) -> Any:
    """Read an entry of a file that `datasets` wrote beside its data."""
    values = read_json(path)
    if not values.get(key):
        raise ValueError(f"{path} has no {key}, which datasets writes; save the data set again")
    return values[key]


def _of_files(source: str, files: dict[str, Path], column: str, left_out: LeftOut) -> Corpus:
    """Open files of rows of one kind; or of text; or rows as only data have, beside text that is left out.

    Args:
        files: by their paths below the source.
    """
    by_suffix: dict[str, dict[str, Path]] = {}
    for name, path in files.items():
        if path.name in _BOOKKEEPING:
            left_out.add("about the data", name)
        else:
            by_suffix.setdefault(suffix_of(path), {})[name] = path
    kinds = {KINDS[suffix] for suffix in by_suffix if suffix in KINDS}
    rows = {name: path for suffix, some in by_suffix.items() if suffix in KINDS for name, path in some.items()}
    texts = {name: path for suffix, some in by_suffix.items() if suffix not in KINDS for name, path in some.items()}
    if len(kinds) > 1 or (texts and rows and not _DATA & by_suffix.keys()):
        raise ValueError(_ambiguous(source, by_suffix))
    if not rows:
        return _of_texts(source, texts, left_out)
    for name in texts:
        left_out.add(f"beside {kinds.copy().pop()} files", name)
    return _of_rows(source, rows, kinds.pop(), column, left_out)


_BOOKKEEPING = {"dataset_info.json", "dataset_infos.json", "state.json"}
_DATA = {".jsonl", ".ndjson", ".parquet", ".arrow", ".feather"}
"""Suffixes of files that are there for their rows; a CSV or JSON file may be one of many of a source tree."""


def _ambiguous(source: str, by_suffix: dict[str, dict[str, Path]]) -> str:
    found = "; ".join(
        f"{len(files)} {suffix or 'without suffix'} ({some(list(files))})" for suffix, files in by_suffix.items()
    )
    suffix = max(by_suffix, key=lambda suffix: len(by_suffix[suffix])) or ".txt"
    return (
        f"{source} holds files of several kinds, of which some cannot be the documents: {found}; name those that are, "
        f"as data.source='{source}/**/*{suffix}', or write a corpus of some with openmoba corpus {source} --suffixes"
    )


def _of_texts(source: str, files: dict[str, Path], left_out: LeftOut | None = None) -> Corpus:
    """Make each file that holds text a document; the others are left out."""
    left_out = left_out or LeftOut()
    digest = _digest("text")
    texts = {}
    for name, path in files.items():
        try:
            text = read_text(path)
        except NotTextError as error:
            left_out.add(str(error), name)
            continue
        if text:
            texts[name] = path
            digest.update(hashlib.blake2b(text.encode()).digest())
        else:
            left_out.add("empty", name)
    if not texts and len(files) != 1:
        raise ValueError(f"{source} holds no documents; {str(left_out) or 'it is empty'}; give another folder or file")

    def items() -> Iterator[Item]:
        for done, (name, path) in enumerate(texts.items(), 1):
            yield Item(name, read_text(path), done / len(texts))

    return Corpus(source, digest.hexdigest(), items, left_out)


def _of_rows(source: str, files: dict[str, Path], kind: str, column: str, left_out: LeftOut | None = None) -> Corpus:
    """Make each row of the files a document."""
    digest = _digest(f"{kind} {column}")
    sizes = []
    for path in files.values():
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
                sizes.append(file.tell())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; restore it, or leave it out") from error

    def items() -> Iterator[Item]:
        for number, (name, path) in enumerate(files.items()):
            for row in read_rows(path, kind, column):
                where = f"{name}:{row.number}"
                share = (sum(sizes[:number]) + row.share * sizes[number]) / max(1, sum(sizes))
                yield Item(where, _document(row.value, f"{path}, row {row.number}"), share)

    return Corpus(source, digest.hexdigest(), _of_one_kind(source, items), left_out or LeftOut())


def _digest(kind: str) -> Any:
    return hashlib.blake2b(f"{_READING} {kind}".encode(), digest_size=16)


def _document(value: Any, where: str) -> Document | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return messages_of(value, where)
    raise ValueError(f"{where}: a document is a text or a list of messages with roles, got {value!r:.80}")


def _of_one_kind(source: str, items: Callable[[], Iterator[Item]]) -> Callable[[], Iterator[Item]]:
    """Yield the items, until one is a text after conversations, or the other way round."""

    def checked() -> Iterator[Item]:
        first: Item | None = None
        for item in items():
            if item.document:
                first = first or item
                if isinstance(first.document, str) != isinstance(item.document, str):
                    kinds = ("text", "conversation") if isinstance(first.document, str) else ("conversation", "text")
                    raise ValueError(
                        f"{source} mixes texts and conversations: {first.name} is a {kinds[0]}, {item.name} a "
                        f"{kinds[1]}; part them into two sources"
                    )
            yield item

    return checked


def _standard_library() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        files += [Path(here, name) for name in names if name.endswith(".py")]
    return {path.relative_to(root).as_posix(): path for path in sorted(files)}


def _below(path: Path, paths: Iterable[Path]) -> str:
    """Return the path below the folder that all the paths share."""
    return path_below(path, Path(os.path.commonpath([other.parent for other in paths])))


def _hub_files(source: str) -> list[Path]:
    """Find the Arrow files of `NAME[@CONFIG][:SPLIT]` in the local cache, downloaded where missing."""
    import datasets

    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise ValueError(f"{source!r} is no file, and not readable as a data set of the hub: {error}") from error
    return [Path(entry["filename"]) for entry in rows.cache_files]
