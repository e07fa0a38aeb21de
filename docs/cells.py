"""Rows of the benchmarks below results/, and how a table of the documents writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from openmoba.bench.cases import GRIDS, PASSES, Case
from openmoba.bench.contenders import contender_label
from openmoba.bench.rows import length_name, markdown_table, newest, read_rows
from openmoba.bench.table import Row, compared, dense_names
from openmoba.bench.training.cases import TrainingRow

HEADLINE = ("D", "block / top-k", "tokens", "forward", "both passes", "dense", "speed-up", "FlashMoBA")
DECODE_TOKENS = (2**15, 2**17, 2**19)


class Pair(NamedTuple):
    """MoBA's rows of one case, forward alone and with backward, and FlashMoBA's beside the latter."""

    forward: Row | None
    both: Row | None
    peer: Row | None

    @property
    def shown(self) -> Row:
        """The row that is compared."""
        row = self.both or self.forward
        assert row is not None
        return row

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of `HEADLINE`."""
        row = self.shown
        return (*setting(row), ms(self.forward), ms(self.both), dense_ms(row), speedup(row), ms(self.peer))

    @property
    def costs(self) -> tuple[str, ...]:
        """Share of the roofline, and memory of each pass."""
        row = self.shown
        memory = ("-" if mb is None else f"{mb:.0f}" for mb in (row.forward_mb, row.backward_mb))
        return ("-" if row.roofline is None else f"{row.roofline:.0%}", *memory)


def headline(root: Path, name: str) -> list[Pair]:
    """Read the measured headline cases of one sequence and random routing."""
    rows = {replace(row, device=None, commit=None).key: row for row in newest_rows(root, name)}

    def measured(contender: str, case: Case, passes: str) -> Row | None:
        row = rows.get(Row.of(contender, replace(case, passes=passes)).key)
        return row if row and row.error is None else None

    cases = [case for case in GRIDS["headline"] if case.routing == "random" and case.batch == 1]
    pairs = []
    for case in dict.fromkeys(replace(case, passes=PASSES[1]) for case in cases):
        forward, both = (measured("moba", case, passes) for passes in PASSES)
        if forward or both:
            pairs.append(Pair(forward, both, measured("flash_moba", case, PASSES[1] if both else PASSES[0])))
    return pairs


def measured_rows(root: Path, name: str, contender: str, grid: str) -> dict[Case, Row]:
    """Read a contender's rows of a grid by case, in the grid's order, failures left out."""
    rows = {replace(row, device=None, commit=None).key: row for row in newest_rows(root, name) if row.error is None}
    return {case: rows[key] for case in GRIDS[grid] if (key := Row.of(contender, case).key) in rows}


def newest_rows(root: Path, name: str) -> list[Row]:
    """Read the newest row of every case; none without the file."""
    rows = newest(read_rows(root / name, Row))
    return [compared(row, rows) for row in rows]


def shown_rows(pairs: Sequence[Pair]) -> list[Row]:
    return [row for pair in pairs for row in (pair.both, pair.forward) if row]


def dense_sentence(root: Path, rows: Sequence[Row], name: str) -> str:
    """Say which dense attention `rows` are compared with, and which others were slower."""
    timed = [
        row for row in newest_rows(root, name) if row.block_size is None and row.passes in {row.passes for row in rows}
    ]
    fastest = dense_names(rows, timed)
    others = dict.fromkeys(row.contender for row in timed if row.p50_ms and row.contender not in fastest)
    slower = f", faster than {'; '.join(map(contender_label, others))}" if others else ""
    return f"Dense attention is {'; '.join(map(contender_label, fastest)) or 'not timed'}{slower}."


def decode_rows(root: Path, machine: str) -> list[Row]:
    """Return the decoding steps of the documents, by batch and length."""
    rows = newest_rows(root, f"results/{machine}/decode.csv")
    steps = [row for row in rows if row.contender == "moba" and row.error is None and row.passes == "decode"]
    shown = [row for row in steps if row.tokens in DECODE_TOKENS]
    return sorted(shown, key=lambda row: (row.batch, row.tokens))


def training_rows(root: Path, machine: str) -> tuple[list[TrainingRow], str, bool]:
    """Read the newest row of every training case; return them, their file, and whether it has been drawn."""
    file = f"results/{machine}/training.csv"
    return newest(read_rows(root / file, TrainingRow)), file, (root / file).with_suffix(".png").exists()


def table(head: Sequence[str], cells: Sequence[Sequence[object]], origin: str) -> str:
    """Return a table as Markdown, and below it where its numbers come from."""
    return "\n".join((*markdown_table(head, cells), "", origin))


def source(file: str) -> str:
    """Return a link from a page in docs/ to the rows behind it."""
    return f"[{file}](../{file})"


def setting(row: Row) -> tuple[str, str, str]:
    return (str(row.head_dim), blocks(row), length_name(row.tokens))


def blocks(row: Row) -> str:
    return f"{row.block_size} / {row.top_k}"


def ms(row: Row | None) -> str:
    return number(row.p50_ms if row else None)


def dense_ms(row: Row) -> str:
    return number(row.dense_ms)


def speedup(row: Row) -> str:
    return "-" if row.speedup is None else f"{row.speedup:.1f}x"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"
