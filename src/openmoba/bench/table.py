"""The rows of the attention and decode benchmarks, and a Markdown table of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from openmoba.bench.cases import Case
from openmoba.bench.contenders import CONTENDERS
from openmoba.bench.rows import CsvRow, length_name


@dataclass(frozen=True)
class Row(CsvRow):
    """One contender on one case. An empty cell is None: MoBA's settings for a dense contender, results of a failure.

    Attributes:
        p20_ms, p50_ms, p80_ms: quantiles of `samples` timings of the whole call.
        forward_mb, backward_mb: peak memory of the pass above what it began with, 10^6 bytes.
        dense_ms: median of the fastest dense contender on this shape, of the same commit and device.
        speedup: `dense_ms / p50_ms`.
        matrix_tflops: rate of a large matrix product in this run, 10^12 operations per second.
        roofline: operations the call has to do over what `matrix_tflops` could have done in `p50_ms`.
        first_block_share: share of all queries that chose the first block as a past block.
        path: implementation and path as in `openmoba.explain`.
        library: what ran, with its version.
        error: why there is no result.
    """

    contender: str
    passes: str
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int | None
    top_k: int | None
    routing: str | None
    dtype: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    forward_mb: float | None = None
    backward_mb: float | None = None
    dense_ms: float | None = None
    speedup: float | None = None
    matrix_tflops: float | None = None
    roofline: float | None = None
    first_block_share: float | None = None
    path: str | None = None
    library: str | None = None
    error: str | None = None
    device: str | None = None
    power_limit_w: float | None = None
    torch: str | None = None
    triton: str | None = None
    openmoba: str | None = None
    commit: str | None = None
    time: str | None = None

    @classmethod
    def of(cls, contender: str, case: Case, **results: Any) -> Row:
        """The row of `contender` on `case`; dense attention is the same for all blocks and routings."""
        settings = asdict(case)
        if CONTENDERS[contender].kind == "dense":
            settings |= {"block_size": None, "top_k": None, "routing": None}
        return cls(contender=contender, **settings, **results)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.contender, self.block_size, self.top_k, self.routing, *self.shape)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two rows must share to be compared."""
        size = (self.passes, self.tokens, self.batch, self.heads, self.kv_heads, self.head_dim, self.dtype)
        return (*size, self.device, self.commit)


def markdown(rows: Iterable[Row]) -> str:
    """MoBA's rows as a Markdown table; dense contenders are in it as the fastest of them."""
    lines = [
        "| D | block/top-k | T | passes | routing | ms | best dense, ms | speed-up | roofline | extra MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.contender == "moba":
            cells = (
                row.head_dim,
                f"{row.block_size}/{row.top_k}",
                _length(row),
                row.passes,
                row.routing,
                *_results(row),
            )
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _results(row: Row) -> tuple[str, ...]:
    if row.error:
        return (row.error, "", "", "", "")
    memory = " / ".join(f"{mb:.0f}" for mb in (row.forward_mb, row.backward_mb) if mb is not None)
    dense = "" if row.dense_ms is None else f"{row.dense_ms:.3g}"
    speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
    share = "" if row.roofline is None else f"{100 * row.roofline:.0f} %"
    return (f"{row.p50_ms:.3g}", dense, speedup, share, memory)


def _length(row: Row) -> str:
    return length_name(row.tokens) if row.batch == 1 else f"{row.batch} x {length_name(row.tokens)}"
