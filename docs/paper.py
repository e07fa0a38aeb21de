"""The cost of one sequence over many GPUs, on paper: from one GPU's measured time and bandwidths that are assumed."""

from __future__ import annotations

from pathlib import Path

from openmoba.bench.rows import commits, length_name, markdown_table, newest, read_rows
from openmoba.bench.table import Row
from openmoba.parallel.cost import Call, choose_way, crossover, predicted_seconds

# What a GPU sends in bytes a second: over NVLink within a machine, and over a network of 400 Gbit/s between machines.
ASSUMED = ((8, 350e9), (64, 45e9))


def cost(root: Path, machine: str) -> str:
    """Write the table of both ways, for what was measured at a million tokens on one GPU of `machine`."""
    path = root / "results" / machine / "attention.csv"
    if not path.exists():
        return ""
    rows = [row for row in newest(read_rows(path, Row)) if _is_long(row)]
    head = ("block / top-k", "tokens", "one GPU", "GPUs", "GB/s", "by heads", "by keys", "gain", "by rule", "equal at")
    lines = markdown_table(head, [_cells(row, ranks, bandwidth) for row in rows for ranks, bandwidth in ASSUMED])
    if not rows:
        return ""
    first = rows[0]
    return "\n".join(
        [
            f"Both passes in ms, {first.heads} query and {first.kv_heads} key/value heads of width {first.head_dim}, "
            f"bf16. One GPU ({first.device}) was measured, at commit {commits(rows)}; **all else is computed**, from "
            "bandwidths that are assumed. Above the bandwidth in the last column keys are faster, below it heads.",
            "",
            *lines,
            "",
        ]
    )


def _is_long(row: Row) -> bool:
    return row.contender == "moba" and row.tokens == 2**20 and row.passes == "forward+backward" and bool(row.p50_ms)


def _cells(row: Row, ranks: int, bandwidth: float) -> list[str]:
    assert row.p50_ms is not None
    call = Call(row.tokens, row.p50_ms / 1000, row.heads, row.kv_heads, row.head_dim)
    ms = [1000 * predicted_seconds(way, call, ranks, bandwidth) for way in ("heads", "keys")]
    if row.heads % ranks:
        ms[0] = float("inf")
    equal = crossover(call, ranks)
    return [
        f"{row.block_size} / {row.top_k}",
        length_name(row.tokens),
        f"{row.p50_ms:.4g}",
        str(ranks),
        f"{bandwidth / 1e9:.0f}",
        "-" if row.heads % ranks else f"{ms[0]:.4g}",
        f"{ms[1]:.4g}",
        f"{row.p50_ms / min(ms):.1f}x",
        choose_way(row.heads, row.kv_heads, ranks),
        "-" if equal is None or row.heads % ranks else f"{equal / 1e9:.3g} GB/s",
    ]
