"""`openmoba corpus`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openmoba.lab.data.rules import DocumentRules, FileRules
from openmoba.lab.progress import TerminalProgress
from openmoba.limits import check_count


@dataclass(frozen=True)
class MakeCorpus:
    """Say what a source of documents holds, and write it as Parquet, split for training and validation.

    The same source and options give the same documents in the same order.
    """

    source: tyro.conf.Positional[str]
    """Documents: what data.source of a run takes, or a folder whose directories are to be the documents."""
    documents: Literal["files", "directories"] = "files"
    """Of a folder: each text file is a document, or each directory is one, its files in order of their paths, each
    under a line with its path, and of files with the same contents the first alone."""
    files: Annotated[FileRules, tyro.conf.arg(name="")] = field(default_factory=FileRules)
    merge_below: int = 200_000
    """directories: those of fewer bytes are merged into the one around them."""
    column: str = "text"
    """Column of the text, where the source has columns."""
    out: Path | None = None
    """Write OUT.parquet, or, with --hold-out, OUT-train.parquet and OUT-valid.parquet; columns id and text."""
    select: Annotated[DocumentRules, tyro.conf.arg(name="")] = field(default_factory=DocumentRules)
    tokenizer: str = "bpe"
    """"bpe" (trained on the training documents), "bytes", or a folder or hub name for AutoTokenizer."""
    vocab_size: tuple[int, ...] = (2048,)
    """Entries of the BPE tokenizers to count tokens with."""
    length: int = 1024
    """Tokens of the windows to count."""
    cache: Path = Path(".data")
    """Folder that keeps tokenised corpora; the same as data.cache of a run, which then need not tokenise again."""

    def run(self) -> None:
        """Write, if asked, and report."""
        self._check()
        from openmoba.lab.data.corpus import open_corpus
        from openmoba.lab.data.directories import open_directories
        from openmoba.lab.data.holdings import holdings, overview, table
        from openmoba.lab.data.making import write_corpus
        from openmoba.lab.data.store import survey

        progress = TerminalProgress("corpus")
        if self.documents == "directories":
            corpora = [open_directories(self.source, self.files, self.merge_below)]
        else:
            corpora = [open_corpus(self.source, self.column, self.files)]
        surveyed = survey(corpora[0], self.cache, progress)
        print(overview(self.source, surveyed), *filter(None, [str(corpora[0].left_out)]), sep="\n", flush=True)
        if self.out is not None:
            paths = write_corpus(corpora[0], surveyed, self.select, self.out, progress)
            corpora = [open_corpus(str(path)) for path in paths]
            for path, corpus in zip(paths, corpora, strict=True):
                print(overview(str(path), survey(corpus, self.cache, progress)))
                print(f"{path}: {path.stat().st_size:,} bytes, zstd level {self.select.level}", flush=True)
        counted = holdings(corpora, self.tokenizer, self.vocab_size, self.length, self.cache, progress)
        print(table(counted, self.length))

    def _check(self) -> None:
        for size in self.vocab_size:
            check_count("vocab_size", size, 257)  # the bytes and the end of a text
        check_count("length", self.length, 2)
        check_count("merge_below", self.merge_below, 0, sys.maxsize)
        if self.out is None and self.select != DocumentRules():
            raise ValueError("the options that pick documents need --out, the name of the files to write")
