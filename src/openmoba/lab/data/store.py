"""Tokenised corpora on disk: tokenised once, memory-mapped ever after, named by a hash of their contents.

A store is a folder of NumPy arrays, written aside and renamed into place when it is whole:

    tokens.npy   [tokens] uint16 or uint32, the documents end to end
    starts.npy   [documents + 1] int64, where each begins
    written.npy  [tokens] bool, chat data only: the tokens that the assistant wrote
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openmoba.lab.data.chat import content_of, encode_chat
from openmoba.lab.data.corpus import Corpus, Document
from openmoba.lab.data.tokenizer import encode_texts, fingerprint, table_size
from openmoba.lab.progress import Percent, Progress
from openmoba.records.locks import lock

_CHARACTERS_PER_BATCH = 4_000_000

# Name of what is kept of every corpus.
_SURVEY = "documents"


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a corpus' documents, memory-mapped; see the module for the arrays."""

    tokens: np.ndarray
    starts: np.ndarray
    written: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 `[documents]`."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Survey:
    """What is known of the documents before they are tokenised.

    Attributes:
        sizes: characters of each document, int64 `[documents]`.
        digests: hash of each document, uint64 `[documents]`.
        bytes: of each document in UTF-8, int64 `[documents]`.
    """

    sizes: np.ndarray
    digests: np.ndarray
    bytes: np.ndarray


def survey(corpus: Corpus, cache: Path, progress: Progress) -> Survey:
    """Measure sizes and digests of the documents, kept in `cache`; ValueError if there are none."""

    def write(folder: Path) -> None:
        progress.note(f"reading {corpus.name}")
        rows = np.fromiter(_measures(corpus, progress), dtype=_MEASURES)
        for name in _MEASURES.names or ():
            np.save(folder / f"{name}.npy", rows[name])

    folder = cached(cache, f"{_SURVEY}-{corpus.digest}", write)
    surveyed = Survey(**{name: _load(folder / f"{name}.npy") for name in _MEASURES.names or ()})
    if len(surveyed.sizes) == 0:
        left_out = f" ({corpus.left_out})" if corpus.left_out.paths else ""
        raise ValueError(f"{corpus.name} has no documents with text in them{left_out}; give another source")
    return surveyed


_MEASURES = np.dtype([("sizes", np.int64), ("digests", np.uint64), ("bytes", np.int64)])


def _measures(corpus: Corpus, progress: Progress) -> Iterator[tuple[int, int, int]]:
    """Yield characters, hash and bytes of each document."""
    percent = Percent(progress, f"percent read of {corpus.name}")
    empty = 0
    for item in corpus.items():
        percent.step(item.share)
        if not item.document:
            empty += 1
            continue
        content = _content(item.document)
        try:
            encoded = content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{corpus.name}, {item.name}: {error}; such characters are no text, leave them out"
            ) from error
        digest = hashlib.blake2b(encoded, digest_size=8).digest()
        yield len(content), int.from_bytes(digest, sys.byteorder), len(encoded)
    if empty:
        progress.note(f"{corpus.name}: left out {empty} rows that hold no text")


def tokenise(corpus: Corpus, tokenizer: Any, cache: Path, progress: Progress) -> TokenStore:
    """Return the corpus' token store, made in `cache` if it is not there yet."""
    name = f"tokens-{corpus.digest}-{fingerprint(tokenizer)}"
    folder = cached(
        cache, name, lambda folder: _write_store(corpus, tokenizer, folder, survey(corpus, cache, progress), progress)
    )
    written = folder / "written.npy"
    return TokenStore(
        _load(folder / "tokens.npy", mmap_mode="r"),
        _load(folder / "starts.npy"),
        _load(written, mmap_mode="r") if written.exists() else None,
    )


def cached(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder `name` of `cache`, filled by `write` unless it is there; by one process at a time."""
    target = cache / name
    if target.exists():  # a cache that is complete may be read-only
        return target
    with _writing_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with lock(cache / f"{name}.lock"):
            if not target.exists():
                _remove_leftovers(cache)
                partial = cache / f".partial-{name}"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                write(partial)
                partial.rename(target)
    return target


def _remove_leftovers(cache: Path) -> None:
    """Remove what writers that were killed left, which may be as large as a corpus: nobody holds its lock."""
    for partial in cache.glob(".partial-*"):
        with lock(cache / f"{partial.name.removeprefix('.partial-')}.lock", wait=False) as mine:
            if mine:
                shutil.rmtree(partial)


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete the folder {path.parent}, it is made again then"
        ) from error
    return array


@contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    """Say that the cache cannot be written, if it is the cache: documents and libraries have files elsewhere."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else cache
        if cache not in (named, *named.parents):
            raise
        raise ValueError(f"cannot write {cache}: {error.strerror}; set data.cache to another folder") from error


def is_cache(folder: Path) -> bool:
    """Tell whether something was kept in `folder` before."""
    return any(folder.glob(f"{_SURVEY}-*"))


def _write_store(corpus: Corpus, tokenizer: Any, folder: Path, surveyed: Survey, progress: Progress) -> None:
    dtype = np.dtype(np.uint16 if table_size(tokenizer) <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    place_D = np.cumsum(surveyed.sizes)
    progress.note(f"tokens of {corpus.name}")
    percent = Percent(progress, f"percent tokenised of {corpus.name}")
    with (folder / "tokens.raw").open("wb") as tokens, (folder / "written.raw").open("wb") as written:
        for batch in _batches(corpus.named()):
            for token_T, written_T in _encode(corpus.name, tokenizer, batch):
                tokens.write(token_T.astype(dtype).tobytes())
                if written_T is not None:
                    written.write(written_T.tobytes())
                lengths.append(len(token_T))
            percent.step(place_D[len(lengths) - 1] / place_D[-1])
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    _raw_to_npy(folder / "tokens.raw", dtype)
    _raw_to_npy(folder / "written.raw", np.dtype(bool))


def _raw_to_npy(path: Path, dtype: np.dtype[Any]) -> None:
    if size := os.path.getsize(path):
        raw = np.memmap(path, dtype=dtype, mode="r", shape=(size // dtype.itemsize,))
        np.save(path.with_suffix(".npy"), raw)
    path.unlink()


Named = tuple[str, Document]


def _encode(corpus: str, tokenizer: Any, documents: list[Named]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    texts = [document for _, document in documents if isinstance(document, str)]
    yield from ((token_T, None) for token_T in encode_texts(tokenizer, texts))
    for name, chat in documents:
        if not isinstance(chat, str):
            try:
                yield encode_chat(tokenizer, chat)
            except ValueError as error:
                raise ValueError(f"the conversation {name} of {corpus} cannot be used: {error}") from error


def _batches(documents: Iterable[Named]) -> Iterator[list[Named]]:
    """Yield documents in lists of some megabytes, so that encoding is parallel and memory bounded."""
    batch: list[Named] = []
    size = 0
    for name, document in documents:
        batch.append((name, document))
        size += len(_content(document))
        if size >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _content(document: Document) -> str:
    return document if isinstance(document, str) else content_of(document)
