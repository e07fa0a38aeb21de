"""The rows of the attention and decode benchmarks, and a Markdown table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from openmoba.bench.cases import Case
from openmoba.bench.contenders import CONTENDERS
from openmoba.bench.rows import CsvRow, length_name
from openmoba.records.markdown import table


@dataclass(frozen=True)
class Row(CsvRow):
    """One contender on one case. An empty cell is None: MoBA's settings for a dense contender, results of a failure.

    Attributes:
        p20_ms, p50_ms, p80_ms: of the whole call.
        forward_mb, backward_mb: peak memory of the pass above what it began with, 10^6 bytes.
        dense_ms: median of the fastest dense contender on this shape, device and torch that had been timed by then.
        speedup: `dense_ms / p50_ms`.
        matrix_tflops: rate of a large matrix product in this run, 10^12 operations per second.
        roofline: operations the call has to do over what `matrix_tflops` could have done in `p50_ms`.
        first_block_share: share of all queries that chose the first block as a past block.
        path: implementation and path as in `openmoba.explain`.
        library: what ran, with its version.
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
    forward_mb: float | None = None
    backward_mb: float | None = None
    dense_ms: float | None = None
    speedup: float | None = None
    matrix_tflops: float | None = None
    roofline: float | None = None
    first_block_share: float | None = None
    path: str | None = None
    library: str | None = None

    @classmethod
    def of(cls, contender: str, case: Case, **results: Any) -> Row:
        """Make the row of `contender` on `case`; dense attention is the same for all blocks and routings."""
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

    @property
    def setting(self) -> tuple[Any, ...]:
        """The shape wherever the commit is of no matter: dense attention is none of ours."""
        return (*self.shape[:-1], self.torch)


def fastest_dense(row: Row, rows: Iterable[Row]) -> Row | None:
    """Find the fastest dense contender on the shape, device and torch of `row`, by the last row of each."""
    dense = (other for other in rows if other.block_size is None and other.p50_ms and other.setting == row.setting)
    last = {other.contender: other for other in dense}
    return min(last.values(), key=lambda other: other.p50_ms or 0, default=None)


def compared(row: Row, rows: Iterable[Row]) -> Row:
    """Fill in `dense_ms` and `speedup` by the dense contenders of `rows`; none for a dense contender itself."""
    dense = None if row.block_size is None else fastest_dense(row, rows)
    if dense is None or not dense.p50_ms or not row.p50_ms:
        return replace(row, dense_ms=None, speedup=None)
    return replace(row, dense_ms=dense.p50_ms, speedup=dense.p50_ms / row.p50_ms)


def dense_names(rows: Iterable[Row], timed: Sequence[Row]) -> list[str]:
    """Name the dense contenders that `rows` are compared with: for each the fastest of `timed`."""
    found = (fastest_dense(row, timed) for row in rows)
    return list(dict.fromkeys(row.contender for row in found if row is not None))


def markdown(rows: Iterable[Row]) -> str:
    """Write MoBA's rows as a Markdown table; dense contenders are in it as the fastest of them."""
    heads = ("D", "block/top-k", "T", "passes", "routing", "ms", "best dense, ms", "speed-up", "roofline", "extra MB")
    cells = (
        (row.head_dim, f"{row.block_size}/{row.top_k}", _length(row), row.passes, row.routing, *_results(row))
        for row in rows
        if row.contender == "moba"
    )
    return "\n".join(table(heads, cells))


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
