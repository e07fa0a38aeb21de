"""What is timed over several devices, the named grids of such cases, and their rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from openmoba.bench.rows import CsvRow, length_name, markdown_table

KINDS = ("attention", "transfer", "step")


@dataclass(frozen=True)
class ParallelCase:
    """One call or one training step of a sequence that all devices share; of one device it is the whole.

    Attributes:
        kind: "attention", "transfer" (what attention sends, alone, one way), or "step" (as `openmoba train` makes it).
        way, layout: as in `openmoba.parallel.Sharding`; of a step both follow from the model, and are "auto".
        block_size, top_k: MoBA's.
        passes: of attention, "forward" or "forward+backward".
        size: of a step's model, whose heads are its own; its last `full_layers` layers are full.
    """

    kind: str
    tokens: int
    way: str = "auto"
    layout: str = "auto"
    block_size: int = 128
    top_k: int = 8
    passes: str = "forward+backward"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    size: str | None = None
    full_layers: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def words(self) -> str:
        """The case in words."""
        what = (self.kind, self.size, self.way, self.layout, length_name(self.tokens))
        return " ".join(word for word in (*what, f"{self.block_size}/{self.top_k}", self.passes) if word)

    def on(self, ranks: int) -> ParallelCase:
        """Return the case as so many devices run it; of one device there is one way."""
        return replace(self, way="one", layout="contiguous") if ranks == 1 and self.kind != "step" else self


@dataclass(frozen=True)
class ParallelRow(CsvRow):
    """One case on some devices. An empty cell is None.

    Attributes:
        ranks: devices.
        p20_ms, p50_ms, p80_ms: of times, each that of the slowest device.
        peak_mb: most memory that tensors took on a device, 10^6 bytes.
        one_ms: median of the same on one device of the kind, of this commit, if it had been timed by then.
        speedup: `one_ms / p50_ms`.
        gb_per_second: of a transfer, what a device sends, 10^9 bytes a second.
        tokens_per_second: of a step, over all devices.
        waiting: of a step, the share of its time in which no kernel ran but transfers.
    """

    kind: str
    tokens: int
    way: str
    layout: str
    block_size: int
    top_k: int
    passes: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    size: str | None
    full_layers: int | None
    ranks: int
    peak_mb: float | None = None
    one_ms: float | None = None
    speedup: float | None = None
    gb_per_second: float | None = None
    tokens_per_second: float | None = None
    waiting: float | None = None

    @classmethod
    def of(cls, case: ParallelCase, ranks: int, **results: Any) -> ParallelRow:
        """Make the row of `case`."""
        return cls(**asdict(case), ranks=ranks, **results)

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.shape, self.way, self.layout, self.ranks)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What a row on one device must share to be compared."""
        size = (self.kind, self.tokens, self.block_size, self.top_k, self.passes, self.dtype, self.size)
        return (*size, self.full_layers, self.heads, self.kv_heads, self.head_dim, self.device, self.commit)


def compared(row: ParallelRow, rows: Iterable[ParallelRow]) -> ParallelRow:
    """Fill in `one_ms` and `speedup` by the rows of one device."""
    alone = [other.p50_ms for other in rows if other.ranks == 1 and other.shape == row.shape and other.p50_ms]
    if not alone or not row.p50_ms or row.ranks == 1:
        return row
    return replace(row, one_ms=alone[-1], speedup=alone[-1] / row.p50_ms)


def markdown(rows: Iterable[ParallelRow]) -> str:
    """Write the rows as a Markdown table."""
    head = ("what", "devices", "way", "tokens", "block/top-k", "ms", "speed-up", "GB/s", "tokens/s", "waiting", "MB")
    return "\n".join(markdown_table(head, [_cells(row) for row in rows]))


def _cells(row: ParallelRow) -> tuple[str, ...]:
    what = row.passes if row.kind == "attention" else f"{row.kind} {row.size or row.way}"
    numbers = (
        (row.p50_ms, "{:.4g}"),
        (row.speedup, "{:.2f}x"),
        (row.gb_per_second, "{:.0f}"),
        (row.tokens_per_second, "{:,.0f}"),
        (row.waiting, "{:.0%}"),
        (row.peak_mb, "{:.0f}"),
    )
    cells = ["-" if value is None else form.format(value) for value, form in numbers]
    if row.error:
        cells[0] = row.error
    way = row.way if row.way in ("one", "auto") else f"{row.way} {row.layout}"
    return (what, str(row.ranks), way, length_name(row.tokens), f"{row.block_size}/{row.top_k}", *cells)


_K = 1024
_BALANCED = (("heads", "contiguous"), ("keys", "head-tail"))
_WAYS = (*_BALANCED, ("keys", "contiguous"))


def _attention(passes: str, ways: Iterable[tuple[str, str]]) -> tuple[ParallelCase, ...]:
    return tuple(
        ParallelCase("attention", tokens * _K, way, layout, block, top_k, passes)
        for block, top_k in ((128, 8), (4096, 12))
        for tokens in (256, 1024)
        for way, layout in ways
    )


def _transfers(*tokens: int, **size: Any) -> tuple[ParallelCase, ...]:
    return tuple(
        ParallelCase("transfer", n, way, "contiguous", passes="forward", **size)
        for n in tokens
        for way in ("heads", "keys")
    )


_MAIN = (*_transfers(256 * _K, 1024 * _K), *_attention("forward+backward", _BALANCED))
# The heads of the 545m model are 14 of width 128.
_STEP = ParallelCase(
    "step", 512 * _K, block_size=512, top_k=3, heads=14, kv_heads=14, dtype="bfloat16", size="545m", full_layers=3
)
_SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "block_size": 32, "top_k": 2}
_TINY = {"heads": 8, "kv_heads": 2, "head_dim": 64, "block_size": 64, "top_k": 4}
_SMOKE = (
    *_transfers(4 * _K, **_TINY),
    *(ParallelCase("attention", 4 * _K, way, layout, **_TINY) for way, layout in _WAYS),  # type: ignore[arg-type]
    ParallelCase("step", 4 * _K, top_k=3, heads=4, kv_heads=4, head_dim=64, size="5m", full_layers=1),
)
_CPU = (
    *(ParallelCase("attention", 512, way, layout, **_SMALL) for way, layout in _WAYS),  # type: ignore[arg-type]
    *_transfers(512, **_SMALL),
    ParallelCase("step", 128, block_size=16, top_k=2, heads=2, kv_heads=2, dtype="float32", size="nano", full_layers=1),
)
GRIDS = {
    "headline": (*_MAIN, _STEP, *_attention("forward", _WAYS), *_attention("forward+backward", _WAYS)),
    "attention": _MAIN,
    "smoke": _SMOKE,
    "cpu": _CPU,
    **{f"step-{length_name(n * _K)}": (replace(_STEP, tokens=n * _K),) for n in range(256, 4097, 128)},
}
"""Name -> cases, the most important first. Each "step-LENGTH" is one step of that length, which may not fit: see
benchmarks/parallel.sh."""
