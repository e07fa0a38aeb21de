"""Tables of MoBA beside other code for the same attention, or for full attention."""

from __future__ import annotations

from pathlib import Path

from cells import blocks, headline, measured_rows, ms, newest_rows, number, setting, source, table

from openmoba.bench.cited import beside
from openmoba.bench.contenders import contender_label
from openmoba.bench.rows import commits, length_name
from openmoba.bench.table import Row

CITED = "cited-peers.csv"
DENSE = "flash-attention-4.csv"
"""MoBA beside the fastest dense attention there is, in one run."""


def flex(root: Path, machine: str) -> str:
    """Write FlexAttention, with the mask of MoBA's choice, beside MoBA."""
    file = f"results/{machine}/attention.csv"
    ours, theirs = (measured_rows(root, file, contender, "peers") for contender in ("moba", "flex"))
    pairs = [(ours[case], row) for case, row in theirs.items() if case in ours]
    if not pairs:
        return ""
    head = ("D", "block / top-k", "tokens", "MoBA", "FlexAttention", "ratio")
    cells = [
        (
            row.head_dim,
            blocks(row),
            length_name(row.tokens),
            ms(mine),
            ms(row),
            f"{row.p50_ms / mine.p50_ms:.1f}x",
        )
        for mine, row in pairs
        if mine.p50_ms and row.p50_ms
    ]
    measured = commits(row for pair in pairs for row in pair)
    origin = f"{pairs[0][0].device}, forward and backward, medians in ms. Commit {measured}.\n"
    return table(head, cells, origin)


def dense(root: Path, machine: str) -> str:
    """Write MoBA beside every dense attention that was timed with it."""
    file = f"results/{machine}/{DENSE}"
    rows = newest_rows(root, file)
    ours = [row for row in rows if row.block_size and row.p50_ms]
    if not ours:
        return ""
    names = list(dict.fromkeys(row.contender for row in rows if row.block_size is None))
    times = {(row.contender, row.setting): row.p50_ms for row in rows}
    head = ("D", "block / top-k", "tokens", "MoBA", *map(contender_label, names), *["ratio"] * len(names))
    cells = []
    for row in ours:
        taken = [times.get((name, row.setting)) for name in names]
        ratios = ("-" if other is None else f"{other / (row.p50_ms or 1):.1f}x" for other in taken)
        cells.append((*setting(row), ms(row), *map(number, taken), *ratios))
    first = ours[0]
    origin = (
        f"One {first.device}, forward and backward, medians in ms, one run: commit {commits(ours)}, "
        f"torch {first.torch}, {', '.join(dict.fromkeys(row.library or '' for row in rows))}: {source(file)}.\n"
    )
    return table(head, cells, origin)


def cited(root: Path, machine: str) -> str:
    """Write MoBA beside a contender that was timed apart."""
    file = f"results/{machine}/attention.csv"
    rows = [pair.both for pair in headline(root, file) if pair.both]
    timed = {row.contender for row in newest_rows(root, file) if row.p50_ms}
    lines = beside(rows, root / f"results/{machine}/{CITED}", timed)
    if not lines:
        return ""
    peer = lines[0].peer
    head = ("D", "block / top-k", "tokens", "MoBA", peer.label, "ratio")
    cells = [(*setting(line.row), ms(line.row), number(line.peer.ms), f"{line.ratio}x") for line in lines]
    origin = (
        f"Forward and backward, ms. MoBA: commit {commits(line.row for line in lines)}. {peer.label}: {peer.device}, "
        f"torch {peer.torch}, {peer.date}, by a script that was not kept: {source(f'results/{machine}/{CITED}')}.\n"
    )
    return table(head, cells, origin)


def peer(root: Path, machine: str, row: Row) -> str:
    """Say what another MoBA, timed apart, took on the case of `row`; "" without a figure."""
    line = next(iter(beside([row], root / f"results/{machine}/{CITED}", ())), None)
    if line is None:
        return ""
    peer = line.peer
    return (
        f" MoBA by {peer.label} took {number(peer.ms)} ms, {line.ratio} times as long, timed "
        f"[apart](docs/speed.md#others) on another {peer.device} on {peer.date}."
    )
