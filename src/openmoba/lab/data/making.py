"""A corpus made of a source: which documents train, which are held out, written as Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openmoba.lab.data.corpus import Corpus
from openmoba.lab.data.parquet import write_documents
from openmoba.lab.data.rules import DocumentRules
from openmoba.lab.data.store import Survey
from openmoba.lab.progress import Percent, Progress


def pick(surveyed: Survey, rules: DocumentRules) -> tuple[np.ndarray, np.ndarray]:
    """Number the documents to train on and those held out, int64, in order; of copies, the first alone.

    Raises:
        ValueError: the rules leave no document, or none to hold out.
    """
    _, unique = np.unique(surveyed.digests, return_index=True)
    usable = np.sort(unique[surveyed.bytes[unique] >= rules.smallest])
    order = np.random.default_rng(rules.seed).permutation(usable)
    held = 0 if rules.hold_out is None else len(usable) // rules.hold_out
    if rules.hold_out is not None and held == 0:
        raise ValueError(
            f"--hold-out {rules.hold_out} holds out one of so many documents, and there are {len(usable)}; lower it, "
            "or let more be documents (--smallest, --merge-below)"
        )
    train = order[held:]
    if rules.largest is not None:
        train = train[surveyed.bytes[train] <= rules.largest]
    if rules.total is not None:
        train = train[np.cumsum(surveyed.bytes[train]) <= rules.total]
    if len(train) == 0:
        raise ValueError(
            f"no document is left to write of {len(surveyed.sizes)}, of {surveyed.bytes.min()} to "
            f"{surveyed.bytes.max()} bytes; change --smallest, --largest or --total"
        )
    return np.sort(train), np.sort(order[:held])


def write_corpus(corpus: Corpus, surveyed: Survey, rules: DocumentRules, out: Path, progress: Progress) -> list[Path]:
    """Write the documents that the rules pick, and return the files: of all, or for training and for validation.

    Raises:
        ValueError: no documents left, a document that is no text, a folder that cannot be written.
    """
    train, valid = pick(surveyed, rules)
    parts = [("", train, None)] if rules.hold_out is None else [("-train", train, None), ("-valid", valid, rules.cut)]
    paths = [out.with_name(f"{out.name}{part}.parquet") for part, _, _ in parts]
    for path, (_, documents, cut) in zip(paths, parts, strict=True):
        progress.note(f"writing {path}")
        write_documents(path, _chosen(corpus, documents, cut, progress), rules.level)
    return paths


def _chosen(corpus: Corpus, documents: np.ndarray, cut: int | None, progress: Progress) -> Iterator[tuple[str, str]]:
    """Yield ids and texts of the documents of these numbers."""
    percent = Percent(progress, "percent of the documents written")
    for number, (name, document) in enumerate(corpus.named()):
        place = int(np.searchsorted(documents, number))
        if place == len(documents) or documents[place] != number:
            continue
        if not isinstance(document, str):
            raise ValueError(f"{corpus.name} holds conversations, which are not written; use it as it is")
        yield name, document if cut is None else document.encode()[:cut].decode(errors="ignore")
        percent.step((place + 1) / len(documents))
