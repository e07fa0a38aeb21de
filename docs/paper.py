"""One sequence over many GPUs: what was measured on a few, and from that, on paper, what it costs on more.

The paper takes one GPU's measured time, and bandwidths: measured on two GPUs where that was done, else assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openmoba.bench.parallel.cases import ParallelRow
from openmoba.bench.rows import R, commits, length_name, markdown_table, newest, read_rows
from openmoba.bench.table import Row
from openmoba.parallel.cost import Call, choose_way, crossover, predicted_seconds

WAYS = ("heads", "keys")
NVLINK, NETWORK = 350e9, 45e9
"""What a GPU sends in bytes a second, assumed: within a machine, and over 400 Gbit/s between machines."""


@dataclass(frozen=True)
class Link:
    """GPUs, and what one of them sends in bytes a second by each way."""

    ranks: int
    bandwidth: dict[str, float]
    name: str


def cost(root: Path, machine: str) -> str:
    """Write the table of both ways, for what was measured at a million tokens on one GPU of `machine`."""
    rows = [row for row in _rows(root / "results" / machine / "attention.csv", Row) if _is_long(row)]
    if not rows:
        return ""
    first, measured = rows[0], _bandwidth(_together(root, machine))
    head = ("block / top-k", "tokens", "one GPU", "GPUs", "joined by", "by heads", "by keys", "gain", "waiting",
            "by rule", "equal at")  # fmt: skip
    lines = markdown_table(head, [_cells(row, link) for row in rows for link in _links(measured)])
    rates = (
        "from bandwidths that are assumed"
        if measured is None
        else f"from the bandwidth that two GPUs have by NVLink, {_gigabytes(measured)}, and one assumed of a network"
    )
    return "\n".join(
        [
            f"Both passes in ms, {first.heads} query and {first.kv_heads} key/value heads of width {first.head_dim}, "
            f"bf16. One GPU ({first.device}) was measured, at commit {commits(rows)}; **all else is computed**, "
            f"{rates}. Waiting is the share of the faster way's time in which nothing is computed. Above the "
            "bandwidth in the last column keys are faster, below it heads.",
            "",
            *lines,
            "",
        ]
    )


def measured(root: Path, machine: str) -> str:
    """Write what was measured on several GPUs beside one, and what the paper says of the same."""
    rows = _together(root, machine)
    if not rows:
        return ""
    text = [_attention(rows), _steps(rows), _longest(rows)]
    first = rows[0]
    card = f"{max(row.ranks for row in rows)} {first.device}, at commit {commits(rows)}."
    return "\n".join([*(part for part in text if part), f"Measured on {card}", ""])


def _attention(rows: Sequence[ParallelRow]) -> str:
    shown = [row for row in rows if row.kind == "attention" and row.ranks > 1 and row.speedup]
    if not shown:
        return ""
    bandwidth = _bandwidth(rows)
    one = {_what(row): row.peak_mb for row in rows if row.kind == "attention" and row.ranks == 1}
    head = (*_HEAD, "GB, one GPU", "GB each")
    cells = [
        [*_attention_cells(row, bandwidth), *map(_gigabytes_held, (one.get(_what(row)), row.peak_mb))] for row in shown
    ]
    return "\n".join([*markdown_table(head, cells), ""])


_HEAD = ("passes", "block / top-k", "tokens", "one GPU", "GPUs", "by", "ms", "gain", "lost", "on paper")


def _what(row: ParallelRow) -> tuple[object, ...]:
    """Return what is the same of a call on one GPU and on several."""
    return row.tokens, row.block_size, row.top_k, row.passes, row.heads, row.kv_heads, row.head_dim, row.dtype


def _gigabytes_held(megabytes: float | None) -> str:
    return "-" if megabytes is None else f"{megabytes / 1000:.1f}"


def _attention_cells(row: ParallelRow, bandwidth: dict[str, float] | None) -> list[str]:
    assert row.one_ms
    assert row.p50_ms
    paper = "-"
    if bandwidth is not None and row.passes == "forward+backward" and row.layout != _UNBALANCED.get(row.way):
        call = Call(row.tokens, row.one_ms / 1000, row.heads, row.kv_heads, row.head_dim)
        paper = f"{1000 * predicted_seconds(row.way, call, row.ranks, bandwidth[row.way]):.4g}"
    return [
        "both" if row.passes == "forward+backward" else "forward",
        f"{row.block_size} / {row.top_k}",
        length_name(row.tokens),
        f"{row.one_ms:.4g}",
        str(row.ranks),
        f"{row.way}, {row.layout}",
        f"{row.p50_ms:.4g}",
        f"{row.speedup:.2f}x",
        f"{max(0.0, 1 - row.one_ms / row.ranks / row.p50_ms):.0%}",
        paper,
    ]


_UNBALANCED = {"keys": "contiguous"}


def _steps(rows: Sequence[ParallelRow]) -> str:
    """Say what a step of the hybrid takes at 512K tokens."""
    lines = []
    for row in rows:
        if row.kind == "step" and row.tokens == 2**19 and row.p50_ms:
            gain = f", {row.speedup:.2f} times one GPU" if row.speedup else ""
            waiting = "" if row.waiting is None else f", {row.waiting:.0%} of it waiting for others or for the host"
            lines.append(
                f"A step of a {row.size} hybrid, its last {row.full_layers} layers full, at {length_name(row.tokens)} "
                f"tokens on {row.ranks} GPU{'s' * (row.ranks > 1)}: {row.p50_ms / 1000:.1f} s{gain}{waiting}, "
                f"{row.tokens_per_second:,.0f} tokens/s, {(row.peak_mb or 0) / 1000:.0f} GB a GPU.\n"
            )
    return "\n".join(lines)


def _longest(rows: Sequence[ParallelRow]) -> str:
    """Say the longest sequence that trained, by number of GPUs, and that which did not fit."""
    parts = []
    for ranks in sorted({row.ranks for row in rows if row.kind == "step"}):
        steps = [row for row in rows if row.kind == "step" and row.ranks == ranks]
        fitting = max((row.tokens for row in steps if row.p50_ms), default=None)
        failed = min((row.tokens for row in steps if row.error and row.tokens > (fitting or 0)), default=None)
        if fitting is not None:
            not_fitting = "" if failed is None else f" ({length_name(failed)} does not fit)"
            parts.append(f"{length_name(fitting)} tokens on {ranks} GPU{'s' * (ranks > 1)}{not_fitting}")
    return f"The longest sequence of it that trained: {', '.join(parts)}.\n" if parts else ""


def _together(root: Path, machine: str) -> list[ParallelRow]:
    """Return the newest rows of several GPUs of the kind of `machine`, of the most there are."""
    files = sorted((root / "results").glob(f"{machine}x*/parallel.csv"))
    return _rows(files[-1], ParallelRow) if files else []


def _rows(path: Path, kind: type[R]) -> list[R]:
    return list(newest(read_rows(path, kind))) if path.exists() else []


def _bandwidth(rows: Iterable[ParallelRow]) -> dict[str, float] | None:
    """Return what a GPU sends by each way, at the longest that was timed; None where one of them was not."""
    timed = sorted((row for row in rows if row.gb_per_second), key=lambda row: row.tokens)
    found = {row.way: 1e9 * (row.gb_per_second or 0) for row in timed}
    return found if set(found) == set(WAYS) else None


def _links(measured: dict[str, float] | None) -> list[Link]:
    network = Link(64, dict.fromkeys(WAYS, NETWORK), f"a network, {NETWORK / 1e9:.0f} GB/s")
    if measured is None:
        return [Link(8, dict.fromkeys(WAYS, NVLINK), f"NVLink, {NVLINK / 1e9:.0f} GB/s"), network]
    return [Link(8, measured, "NVLink"), Link(64, measured, "NVLink"), network]


def _gigabytes(bandwidth: dict[str, float]) -> str:
    return " and ".join(f"{bandwidth[way] / 1e9:.0f} GB/s by {way}" for way in WAYS)


def _is_long(row: Row) -> bool:
    return row.contender == "moba" and row.tokens == 2**20 and row.passes == "forward+backward" and bool(row.p50_ms)


def _cells(row: Row, link: Link) -> list[str]:
    assert row.p50_ms is not None
    call = Call(row.tokens, row.p50_ms / 1000, row.heads, row.kv_heads, row.head_dim)
    possible = WAYS if row.heads % link.ranks == 0 else ("keys",)
    ms = {way: 1000 * predicted_seconds(way, call, link.ranks, link.bandwidth[way]) for way in possible}
    best, equal = min(ms.values()), crossover(call, link.ranks)
    return [
        f"{row.block_size} / {row.top_k}",
        length_name(row.tokens),
        f"{row.p50_ms:.4g}",
        str(link.ranks),
        link.name,
        *(f"{ms[way]:.4g}" if way in ms else "-" for way in WAYS),
        f"{row.p50_ms / best:.1f}x",
        f"{max(0.0, 1 - row.p50_ms / link.ranks / best):.0%}",
        choose_way(row.heads, row.kv_heads, link.ranks),
        "-" if equal is None or len(ms) == 1 else f"{equal / 1e9:.3g} GB/s",
    ]
