"""Figures of contenders that this benchmark did not time: medians, as they were noted down elsewhere.

Columns of their file: contender, version, head_dim, tokens, block_size, top_k, forward_ms, backward_ms, device, torch,
date.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from openmoba.bench.contenders import contender_label
from openmoba.bench.table import Row

_Case = tuple[str, int, int, int | None, int | None]


class Cited(NamedTuple):
    """One figure: `ms` of both passes."""

    label: str
    ms: float
    device: str
    torch: str
    date: str


class Beside(NamedTuple):
    """A row of MoBA, and what FlashMoBA took on its case."""

    row: Row
    peer: Cited

    @property
    def ratio(self) -> str:
        """How many times as long as MoBA it took."""
        return f"{self.peer.ms / (self.row.p50_ms or 1):.1f}"


def beside(rows: Sequence[Row], path: Path, timed: Collection[str]) -> list[Beside]:
    """Find those of `rows`, of both passes, of which the file has figures of FlashMoBA, if it was not `timed` here."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["contender"] not in timed]
    figures = {_case(line): _figure(line) for line in lines}
    found = [(row, figures.get(("flash_moba", row.head_dim, row.tokens, row.block_size, row.top_k))) for row in rows]
    return [Beside(row, peer) for row, peer in found if peer]


def _case(line: dict[str, str]) -> _Case:
    block_size, top_k = (int(line[name]) if line[name] else None for name in ("block_size", "top_k"))
    return (line["contender"], int(line["head_dim"]), int(line["tokens"]), block_size, top_k)


def _figure(line: dict[str, str]) -> Cited:
    label = f"{contender_label(line['contender'])} {line['version']}".strip()
    ms = float(line["forward_ms"]) + float(line["backward_ms"])
    return Cited(label, ms, line["device"], line["torch"], line["date"])
