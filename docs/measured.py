"""Tables of docs/speed.md, written from the rows of the benchmarks below results/.

Every table takes the root of the repository, and is empty where the rows are not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cells import (
    HEADLINE,
    blocks,
    decode_rows,
    dense_ms,
    dense_sentence,
    headline,
    measured_rows,
    ms,
    newest_rows,
    shown_rows,
    source,
    speedup,
    table,
    training_rows,
)

from openmoba.bench.cases import PASSES
from openmoba.bench.rows import commits, length_name, short_commit
from openmoba.bench.table import Row
from openmoba.bench.training.document import longest_document, training_document

CPU_TOKENS = 8192
"""Shortest length in the table."""


def attention(root: Path, machine: str) -> str:
    """Write the attention of one GPU: times, share of the roofline, extra memory, and where they come from."""
    file = f"results/{machine}/attention.csv"
    pairs = headline(root, file)
    if not pairs:
        return ""
    last = pairs[0].shown
    return table(
        (*HEADLINE, "roofline", "MB forward", "MB backward"),
        [(*pair.cells, *pair.costs) for pair in pairs],
        f"One {last.device}, {last.power_limit_w:.0f} W, torch {last.torch}, Triton {last.triton}, commit "
        f"{commits(shown_rows(pairs))}: {source(file)}. Medians in ms. The columns from dense on are of both "
        f"passes, or of the forward where it alone was measured. {dense_sentence(root, shown_rows(pairs), file)} MB "
        "are extra memory, 10^6 bytes.\n",
    )


def short(root: Path, machine: str) -> str:
    """Write the short sequences, where the host counts as much as the GPU."""
    file = f"results/{machine}/short.csv"
    rows = [row for row in measured_rows(root, file, "moba", "short").values() if row.dense_ms]
    if not rows:
        return ""
    head = ("D", "tokens", "block / top-k", "MoBA", "dense", "MoBA - dense", "MoBA / dense", "path")
    cells = [
        (
            row.head_dim,
            f"{row.batch} x {length_name(row.tokens)}",
            blocks(row),
            ms(row),
            dense_ms(row),
            f"{(row.p50_ms or 0) - (row.dense_ms or 0):+.2f}",
            f"{(row.p50_ms or 0) / (row.dense_ms or 1):.2f}",
            (row.path or "").split()[-1],
        )
        for row in rows
    ]
    dense = dense_sentence(root, rows, file)
    origin = f"{rows[0].device}, forward and backward, medians in ms. {dense} Commit {commits(rows)}.\n"
    return table(head, cells, origin)


def decode(root: Path, machine: str) -> str:
    """Write a decoding step over a cache."""
    file = f"results/{machine}/decode.csv"
    steps = decode_rows(root, machine)
    if not steps:
        return ""
    first = steps[0]
    head = ("batch", "block / top-k", "cached tokens", "MoBA", "dense", "speed-up")
    cells = [(r.batch, blocks(r), length_name(r.tokens), ms(r), dense_ms(r), speedup(r)) for r in steps]
    origin = (
        f"One attention layer, one token per sequence: one {first.device}, bf16, {first.heads} query and "
        f"{first.kv_heads} key/value heads, D {first.head_dim}. Medians in ms, replayed from a CUDA graph. "
        f"{dense_sentence(root, steps, file)} Commit {commits(steps)}, torch {first.torch}, Triton {first.triton}: "
        f"{source(file)}.\n"
    )
    return table(head, cells, origin)


def paged(root: Path, machine: str) -> str:
    """Write what a cache in pages takes beside a contiguous one."""
    file = f"results/{machine}/paged.csv"
    rows = [row for row in newest_rows(root, file) if row.error is None]
    contiguous = {(row.passes, row.batch, row.tokens, blocks(row)): row for row in rows}
    cells = []
    for row in rows:
        what, _, page_size = row.passes.partition(", pages of ")
        beside = contiguous.get((what, row.batch, row.tokens, blocks(row)))
        if page_size and beside:
            ratio = f"{(row.p50_ms or 0) / (beside.p50_ms or 1):.2f}"
            cells.append(
                (
                    what,
                    row.batch,
                    length_name(row.tokens),
                    blocks(row),
                    page_size,
                    ms(beside),
                    ms(row),
                    ratio,
                )
            )
    if not cells:
        return ""
    first = rows[0]
    head = ("call", "batch", "cached tokens", "block / top-k", "page", "contiguous", "in pages", "ratio")
    origin = (
        f"One attention layer: one {first.device}, bf16, {first.heads} query and {first.kv_heads} key/value heads, "
        f"D {first.head_dim}. Medians in ms. Commit {commits(rows)}, torch {first.torch}, Triton {first.triton}: "
        f"{source(file)}.\n"
    )
    return table(head, cells, origin)


def prefill(root: Path, machine: str) -> str:
    """Write the times of the first and last chunk of a long prompt."""
    rows = [row for row in newest_rows(root, f"results/{machine}/decode.csv") if row.error is None]
    lines = []
    for chunks in _by_setting(row for row in rows if row.passes == "prefill chunk"):
        begin, end = chunks[0], chunks[-1]
        lines.append(
            f"{end.device}: a prompt of {length_name(end.tokens)} tokens in chunks of {length_name(begin.tokens)}, "
            f"block / top-k {blocks(begin)}, takes {ms(begin)} ms for the first chunk and {ms(end)} ms for the "
            f"last. Commit {short_commit(end.commit)}.\n"
        )
    return "".join(lines)


def training(root: Path, machine: str) -> str:
    """Write the training steps of the headline's models: what a user gains end to end."""
    return training_document(*training_rows(root, machine))


def longest(root: Path, machine: str) -> str:
    """Write the longest window that fits on one card."""
    return longest_document(training_rows(root, machine)[0])


def attention_cpu(root: Path) -> str:
    """Write MoBA and causal SDPA on a CPU, forward and backward."""
    file = "results/cpu/attention.csv"
    rows = [row for row in newest_rows(root, file) if (row.contender, row.passes) == ("moba", PASSES[1])]
    rows = [row for row in rows if row.tokens >= CPU_TOKENS]
    if not rows:
        return ""
    cells = [
        (
            row.dtype,
            f"{row.block_size} / {row.top_k}",
            length_name(row.tokens),
            ms(row),
            dense_ms(row),
            speedup(row),
        )
        for row in rows
    ]
    head = ("dtype", "block / top-k", "tokens", "MoBA", "causal SDPA", "speed-up")
    first = rows[0]
    origin = (
        f"{first.device}, batch 1, {first.heads} heads, width {first.head_dim}, causal. Medians in ms of forward and "
        f"backward. Commit {commits(rows)}, torch {first.torch}: {source(file)}, which also has shorter lengths and "
        "the forward alone.\n"
    )
    return table(head, cells, origin)


def _by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows by block size and top-k, in the order of tokens."""
    settings: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.tokens):
        settings.setdefault(blocks(row), []).append(row)
    return list(settings.values())
