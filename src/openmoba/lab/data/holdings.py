"""What a source holds: its documents, their lengths, and the tokens and windows that vocabularies make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmoba.lab.data.corpus import Corpus
from openmoba.lab.data.identity import documents_digest
from openmoba.lab.data.load import named_tokenizer, trained_bpe
from openmoba.lab.data.store import Survey, TokenStore, survey, tokenise
from openmoba.lab.data.tokenizer import table_size
from openmoba.lab.data.windows import cut_windows
from openmoba.lab.progress import Progress

_TOKENS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Holding:
    """A corpus in the tokens of one tokenizer.

    Attributes:
        name: of the corpus.
        vocabulary: entries of the tokenizer.
        tokens: of all documents.
        bytes_per_token: of the text in UTF-8; a loss of x nats per token is x / ln 2 / this in bits per byte.
        frequency_bits: bits per byte of a model that knows how often each token comes and nothing else: a model
            that reads its context must come below.
        windows: of the asked length, from all documents.
        reaching: documents that have one.
    """

    name: str
    vocabulary: int
    tokens: int
    bytes_per_token: float
    frequency_bits: float
    windows: int
    reaching: int


def holdings(
    corpora: Sequence[Corpus], tokenizer: str, vocab_sizes: Iterable[int], length: int, cache: Path, progress: Progress
) -> list[Holding]:
    """Count corpora in the tokens of a named tokenizer, or with "bpe" of one of each size, trained on the first."""
    everything = np.arange(len(survey(corpora[0], cache, progress).sizes))
    counted = []
    for corpus in corpora:
        if tokenizer != "bpe":
            counted.append(holding(corpus, named_tokenizer(tokenizer), length, cache, progress))
            continue
        for size in vocab_sizes:
            trained = trained_bpe(corpora[0], everything, size, cache, progress)
            counted.append(holding(corpus, trained, length, cache, progress))
    return counted


def holding(corpus: Corpus, tokenizer: Any, length: int, cache: Path, progress: Progress) -> Holding:
    """Tokenise all documents of a corpus, or find that done in `cache`, and count."""
    store = tokenise(corpus, tokenizer, cache, progress)
    windows = cut_windows(store, np.arange(len(store.lengths)), length)
    size = int(survey(corpus, cache, progress).bytes.sum())
    return Holding(
        corpus.name,
        len(tokenizer),
        len(store.tokens),
        size / len(store.tokens),
        _entropy(store, table_size(tokenizer)) * len(store.tokens) / size,
        len(windows),
        len(np.unique(windows.documents)),
    )


def _entropy(store: TokenStore, size: int) -> float:
    """Return the bits per token of the tokens' frequencies."""
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, len(store.tokens), _TOKENS_AT_ONCE):
        counts += np.bincount(store.tokens[start : start + _TOKENS_AT_ONCE], minlength=size)
    share = counts[counts > 0] / len(store.tokens)
    return float(-(share * np.log2(share)).sum())


def overview(name: str, surveyed: Survey) -> str:
    """Describe a corpus in a line: how many documents, how long, and the digest of their contents."""
    sizes = surveyed.bytes / 1e6
    copies = len(sizes) - len(np.unique(surveyed.digests))
    return (
        f"{name}: {len(sizes)} documents{f', {copies} of them copies' if copies else ''}; {sizes.sum():.1f} MB; "
        f"from {sizes.min():.3f} to {sizes.max():.3f} MB, median {np.median(sizes):.3f}; "
        f"digest {documents_digest(surveyed.digests)}"
    )


def table(holdings: list[Holding], length: int) -> str:
    """Write the holdings as a table, and how to read a loss in bits per byte."""
    rows = [
        ("corpus", "vocabulary", "tokens", "bytes/token", "frequency bits/byte", f"windows of {length}", "documents"),
        *(
            (
                held.name,
                f"{held.vocabulary:,}",
                f"{held.tokens:,}",
                f"{held.bytes_per_token:.4f}",
                f"{held.frequency_bits:.4f}",
                f"{held.windows:,}",
                f"{held.reaching:,}",
            )
            for held in holdings
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        [
            *lines,
            f"documents: those with a window of {length} tokens and the token after it",
            "frequency bits/byte: the loss of a model that knows how often each token comes, and nothing else",
            f"bits per byte of a loss in nats per token: loss / {math.log(2):.6f} / (bytes/token)",
        ]
    )
