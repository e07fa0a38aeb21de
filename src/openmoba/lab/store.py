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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from openmoba.lab.corpus import Corpus, Document
from openmoba.lab.tokenizer import encode_chat, encode_texts, fingerprint

_CHARACTERS_PER_BATCH = 8_000_000


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
    """

    sizes: np.ndarray
    digests: np.ndarray


def survey(corpus: Corpus, cache: Path) -> Survey:
    """Sizes and digests of the documents, kept in `cache`."""

    def write(folder: Path) -> None:
        contents = [_content(document) for document in corpus.documents()]
        digests = [hashlib.blake2b(content.encode(), digest_size=8).digest() for content in contents]
        np.save(folder / "sizes.npy", np.asarray([len(content) for content in contents], dtype=np.int64))
        np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), dtype=np.uint64))

    folder = cached(cache, f"survey-{corpus.digest}", write)
    return Survey(np.load(folder / "sizes.npy"), np.load(folder / "digests.npy"))


def tokenise(corpus: Corpus, tokenizer: Any, cache: Path) -> TokenStore:
    """The corpus' token store, made in `cache` if it is not there yet."""
    name = f"tokens-{corpus.digest}-{fingerprint(tokenizer)}"
    folder = cached(cache, name, lambda folder: _write_store(corpus, tokenizer, folder))
    written = folder / "written.npy"
    return TokenStore(
        np.load(folder / "tokens.npy", mmap_mode="r"),
        np.load(folder / "starts.npy"),
        np.load(written, mmap_mode="r") if written.exists() else None,
    )


def cached(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` of `cache`, filled by `write` unless it is there; one process at a time does that."""
    target = cache / name
    if target.exists():  # a cache that is complete may be read-only
        return target
    with _writing_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not target.exists():
                partial = cache / f".partial-{name}"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                write(partial)
                partial.rename(target)
    return target


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
    """Whether something was kept in `folder` before."""
    return any(folder.glob("survey-*"))


def _write_store(corpus: Corpus, tokenizer: Any, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    lengths = []
    with (folder / "tokens.raw").open("wb") as tokens, (folder / "written.raw").open("wb") as written:
        for batch in _batches(corpus.documents()):
            for token_T, written_T in _encode(tokenizer, batch):
                tokens.write(token_T.astype(dtype).tobytes())
                if written_T is not None:
                    written.write(written_T.tobytes())
                lengths.append(len(token_T))
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    _raw_to_npy(folder / "tokens.raw", dtype)
    _raw_to_npy(folder / "written.raw", np.dtype(bool))


def _raw_to_npy(path: Path, dtype: np.dtype[Any]) -> None:
    if size := os.path.getsize(path):
        raw = np.memmap(path, dtype=dtype, mode="r", shape=(size // dtype.itemsize,))
        np.save(path.with_suffix(".npy"), raw)
    path.unlink()


def _encode(tokenizer: Any, documents: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    if isinstance(documents[0], str):
        texts = [document for document in documents if isinstance(document, str)]
        yield from ((token_T, None) for token_T in encode_texts(tokenizer, texts))
    else:
        yield from (encode_chat(tokenizer, chat) for chat in documents if not isinstance(chat, str))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of some megabytes, so that encoding is parallel and memory bounded."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(_content(document))
        if size >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _content(document: Document) -> str:
    if isinstance(document, str):
        return document
    if isinstance(document, list) and all(isinstance(m, dict) and "role" in m for m in document):
        return "\n".join(f"{message['role']}\0{message.get('content')}" for message in document)
    raise ValueError(f"a document is a text or a list of messages with roles, got {document!r:.80}")
