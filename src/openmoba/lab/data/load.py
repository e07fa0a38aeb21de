"""From a configuration to windows: the split into training and validation documents, and the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openmoba.lab.config import DataConfig, stored_config
from openmoba.lab.data.corpus import Corpus, open_corpus
from openmoba.lab.data.identity import Identity, Known, documents_digest
from openmoba.lab.data.store import Survey, TokenStore, cached, is_cache, survey, tokenise
from openmoba.lab.data.tokenizer import byte_tokenizer, fingerprint, load_tokenizer, train_bpe
from openmoba.lab.data.windows import Windows, cut_windows
from openmoba.lab.progress import Percent, Progress


@dataclass(frozen=True)
class Data:
    """What a run trains and is measured on.

    Attributes:
        train: windows of the training documents.
        valid: windows of the validation documents, which are none of the training documents.
        tokenizer: a fast tokenizer of the transformers library.
        identity: what they are, see `openmoba.lab.data.identity`.
    """

    train: Windows
    valid: Windows
    tokenizer: Any
    identity: Identity


@dataclass(frozen=True)
class _Split:
    """Corpora, the numbers of the documents used, int64, and the digests of these documents."""

    train: Corpus
    train_documents: np.ndarray
    valid: Corpus
    valid_documents: np.ndarray
    identity: Identity


def load_data(
    config: DataConfig,
    start_from: Path | str | None = None,
    progress: Progress | None = None,
    *,
    resumed: Path | None = None,
    known: Sequence[Known] = (),
) -> Data:
    """Open, split and tokenise the documents, or find all that done in the cache.

    Args:
        start_from: folder or hub name of a model whose tokenizer `tokenizer="auto"` takes.
        resumed: the checkpoint from which a run goes on, whose tokenizer is taken.
        known: data that these must agree with; checked before the work that a difference would waste.

    Raises:
        ValueError: no documents, or none that reaches the window's length, or others than those known, with the
            way out.
    """
    progress = progress or Progress()
    cache = Path(config.cache).expanduser()
    split = _split(config, cache, progress)
    _check(split.identity, known, config)
    tokenizer = load_tokenizer(resumed) if resumed else _tokenizer(config, split, start_from, cache, progress)
    identity = {**split.identity, "tokenizer": fingerprint(tokenizer), "vocabulary": len(tokenizer)}
    _check(identity, known, config)
    store = tokenise(split.train, tokenizer, cache, progress)
    valid_store = store if split.valid == split.train else tokenise(split.valid, tokenizer, cache, progress)
    train = _windows(store, split.train_documents, config.length, f"{config.source} (training)")
    valid = _windows(valid_store, split.valid_documents, config.length, f"{split.valid.name} (validation)")
    identity["training_windows"] = len(train)
    _check(identity, known, config)
    return Data(train, valid, tokenizer, identity)


def load_validation(
    config: DataConfig, model: Path | str, progress: Progress | None = None, *, known: Sequence[Known] = ()
) -> Windows:
    """Load all validation windows, in the tokens of the model in the folder or of the hub name `model`.

    Args:
        known: data whose validation documents these must be.
    """
    progress = progress or Progress()
    cache = Path(config.cache).expanduser()
    tokenizer = load_tokenizer(model)
    if config.valid is None:
        split = _split(config, cache, progress)
        corpus, documents = split.valid, split.valid_documents
        _check({"valid": split.identity["valid"]}, known, config)
    else:
        corpus = _open(config.valid, config.column, progress)
        surveyed = survey(corpus, cache, progress)
        documents = np.arange(len(surveyed.sizes))
        _check({"valid": documents_digest(surveyed.digests)}, known, config)
    store = tokenise(corpus, tokenizer, cache, progress)
    return _windows(store, documents, config.length, f"{corpus.name} (validation)")


def data_of_run(run: Path | str) -> DataConfig:
    """Read the data settings of the run in the folder `run`, to measure it.

    Its cache is used where it is one already. Elsewhere the default is: a run from another machine, or by a stranger,
    does not say where folders are made here.
    """
    data = stored_config(run).data
    return data if is_cache(Path(data.cache).expanduser()) else replace(data, cache=DataConfig().cache)


def validation_windows(windows: Windows, count: int) -> Windows:
    """Pick `count` windows evenly from all validation windows; ValueError if there are fewer."""
    if count > len(windows):
        raise ValueError(
            f"eval.windows={count}, but the validation documents hold {len(windows)} windows of "
            f"{windows.length} tokens; lower eval.windows or data.length, or hold out more documents "
            "(a smaller data.hold_out)"
        )
    return windows.spread(count)


def hold_out(surveyed: Survey, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the documents to train on and those held out, int64; copies of a document appear once.

    Documents are put in order of size and one of every `every` is held out, picked by its hash: so the
    held-out ones are spread over all sizes, and depend on nothing but the documents.
    """
    _, unique = np.unique(surveyed.digests, return_index=True)
    by_size = unique[np.lexsort((surveyed.digests[unique], -surveyed.sizes[unique]))]
    groups = [by_size[start : start + every] for start in range(0, len(by_size), every)]
    held = [
        group[np.argmin(surveyed.digests[group])]
        for group in groups
        if len(group) == every or (group is groups[0] and len(group) > 1)
    ]
    return np.setdiff1d(unique, held), np.sort(np.asarray(held, dtype=np.int64))


def _split(config: DataConfig, cache: Path, progress: Progress) -> _Split:
    train = _open(config.source, config.column, progress)
    surveyed = survey(train, cache, progress)
    if config.valid is None:
        documents, held = hold_out(surveyed, config.hold_out)
        _note_left_out(
            len(surveyed.sizes) - len(documents) - len(held), "copies of others among them", train.name, progress
        )
        if len(held) == 0:
            raise ValueError(f"{config.source} is one document, none is left for validation; set data.valid")
        return _Split(train, documents, train, held, _identity(surveyed, documents, surveyed, held))
    valid = _open(config.valid, config.column, progress)
    held_survey = survey(valid, cache, progress)
    _, unique = np.unique(surveyed.digests, return_index=True)
    fresh = unique[~np.isin(surveyed.digests[unique], held_survey.digests)]
    _note_left_out(len(surveyed.sizes) - len(unique), "copies of others among them", train.name, progress)
    _note_left_out(len(unique) - len(fresh), "they are in data.valid too", train.name, progress)
    if len(fresh) == 0:
        raise ValueError(
            f"every document of data.source={config.source} is one of data.valid={config.valid} too: none is left to "
            "train on; give other validation documents, or leave data.valid out, and data.hold_out holds some out"
        )
    documents, held = np.sort(fresh), np.arange(len(held_survey.sizes))
    return _Split(train, documents, valid, held, _identity(surveyed, documents, held_survey, held))


def _note_left_out(count: int, what: str, source: str, progress: Progress) -> None:
    if count:
        progress.note(f"{source}: left out {count:,} of its documents: {what}")


def _open(source: str, column: str, progress: Progress) -> Corpus:
    """Open the corpus of a source, and say which of its files are in no document."""
    corpus = open_corpus(source, column)
    if corpus.left_out.paths:
        progress.note(f"{source}: {corpus.left_out}")
    return corpus


def _identity(train: Survey, documents: np.ndarray, valid: Survey, held: np.ndarray) -> Identity:
    return {"train": documents_digest(train.digests[documents]), "valid": documents_digest(valid.digests[held])}


def _check(found: Identity, known: Sequence[Known], config: DataConfig) -> None:
    for data in known:
        data.check(found, config.source if config.valid is None else f"{config.source} or {config.valid}")


def _tokenizer(
    config: DataConfig, split: _Split, start_from: Path | str | None, cache: Path, progress: Progress
) -> Any:
    if config.tokenizer == "auto" and start_from is not None:
        return load_tokenizer(start_from)
    if config.tokenizer in ("auto", "bpe"):
        return trained_bpe(split.train, split.train_documents, config.vocab_size, cache, progress)
    return named_tokenizer(config.tokenizer)


def named_tokenizer(name: str) -> Any:
    """Load the tokenizer "bytes", or that of a folder or hub name."""
    return byte_tokenizer() if name == "bytes" else load_tokenizer(name)


def trained_bpe(corpus: Corpus, documents: np.ndarray, vocab_size: int, cache: Path, progress: Progress) -> Any:
    """Train a BPE on the documents of these numbers alone, kept in the cache."""

    def texts() -> Iterator[str]:
        sizes = survey(corpus, cache, progress).sizes
        chosen = np.isin(np.arange(len(sizes)), documents)
        share = np.cumsum(sizes * chosen) / sizes[documents].sum()
        percent = Percent(progress, "percent read for the tokenizer")
        for number, document in enumerate(corpus.documents()):
            if chosen[number]:
                yield document if isinstance(document, str) else "\n".join(m["content"] for m in document)
                percent.step(share[number])
        progress.note("choosing the tokenizer's entries")

    def write(folder: Path) -> None:
        progress.note(f"training a tokenizer of {vocab_size} entries on {corpus.name}")
        train_bpe(texts(), vocab_size).save_pretrained(folder)

    chosen = hashlib.blake2b(documents.tobytes(), digest_size=8).hexdigest()
    return load_tokenizer(cached(cache, f"bpe-{corpus.digest}-{chosen}-{vocab_size}", write))


def _windows(store: TokenStore, documents: np.ndarray, length: int, name: str) -> Windows:
    windows = cut_windows(store, documents, length)
    if len(windows) == 0:
        if store.written is not None:
            raise ValueError(
                f"{name}: none of {len(documents)} conversations has words of the assistant's to learn; give others"
            )
        longest = int(store.lengths[documents].max(initial=0))
        raise ValueError(
            f"{name}: none of {len(documents)} documents reaches the window's {length} + 1 tokens, "
            f"the longest has {longest}; lower data.length below {longest} or use longer documents"
        )
    return windows
