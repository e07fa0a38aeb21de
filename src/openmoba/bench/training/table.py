"""Rows of training as text: a line per case while it runs, a table of all, and the tables of the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from openmoba.bench.rows import length_name
from openmoba.bench.training.cases import TrainingRow
from openmoba.records.markdown import table

ARMS = ("512/3", "128/9")
"""MoBA's settings in the documents, the one that is compared first."""

_HEAD = ("model", "micro-batch", "attention", "layers", "kind", "tokens/s", "ms a step", "TFLOP/s",
         "of the measured matrix rate", "GPU busy", "attention's share", "GB")  # fmt: skip

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Head and lines; "-" where there is no row."""


def outcome(row: TrainingRow) -> str:
    """Say what was found, in a few words."""
    if row.error:
        return row.error
    longest = f"{length_name(row.tokens)} tokens fit ({row.limit}), " if row.kind == "longest" else ""
    rate = f"{row.tflops:.3g} TFLOP/s, {row.mfu:.1%} of the measured matrix rate"
    return f"{longest}{rate_name(row.tokens_per_second)} tokens/s, {rate}"


def markdown(rows: Iterable[TrainingRow]) -> str:
    """Write a line per row."""
    return "\n".join(table(_HEAD, map(_cells, rows)))


def rate_name(rate: float | None) -> str:
    """Write tokens per second: 1.63 M, 489 K, 812."""
    if rate is None:
        return "-"
    if rate >= 1e6:
        return f"{rate / 1e6:.2f} M"
    return f"{rate / 1e3:.0f} K" if rate >= 1e4 else f"{rate:.0f}"


class _Model(NamedTuple):
    """What is compared across attentions."""

    family: str
    size: str
    batch: int
    tokens: int


_OTHERS = (("eager", "loop"), ("graphed", "loop"), ("graphed", "trainer"), ("compiled", "trainer"))
"""Layers and kind of what stands beside compiled loops; the last two are `openmoba train`, now and before graphs."""


def comparison(rows: Sequence[TrainingRow]) -> Table:
    """Write a line per model: tokens per second of full attention and of `ARMS`, and what explains them."""
    found = {
        (_Model(row.family, row.size, row.batch, row.tokens), row.arm, row.layers, row.kind): row
        for row in rows
        if not (row.error or row.checkpointing)
    }
    head = ("model", "micro-batch", "full", *(f"MoBA {arm}" for arm in ARMS), "gain", "of the measured matrix rate",
            "attention's share", "GPU busy", "GB", "MoBA, eager layers", "MoBA, CUDA graphs",
            "MoBA, `openmoba train`")  # fmt: skip
    lines = []
    for model in dict.fromkeys(key[0] for key in found):
        full, *sparse = (found.get((model, arm, "compiled", "loop")) for arm in ("full", *ARMS))
        if full and sparse[0]:
            eager, graphed, trained, stepwise = (found.get((model, ARMS[0], *kind)) for kind in _OTHERS)
            lines.append(_compared(model, full, sparse, (eager, graphed, trained or stepwise)))
    return head, lines


def longest_windows(rows: Sequence[TrainingRow]) -> Table:
    """Write a line per model: the longest window of full attention and of MoBA, with the time of a step."""
    found = {(f"{row.family} {row.size}", row.checkpointing, row.arm): row for row in rows}
    lines = [
        (model, "yes" if stored else "no", *(_longest(found.get((model, stored, arm))) for arm in ("full", ARMS[0])))
        for model, stored in dict.fromkeys(key[:2] for key in found)
    ]
    return ("model", "checkpointing", "full", f"MoBA {ARMS[0]}"), lines


def _compared(
    model: _Model, full: TrainingRow, sparse: Sequence[TrainingRow | None], others: Iterable[TrainingRow | None]
) -> tuple[str, ...]:
    """Write a line of `comparison`; the columns after the rates compare the first of `sparse` with `full`."""
    moba = sparse[0]
    assert moba is not None
    gain = (moba.tokens_per_second or 0) / (full.tokens_per_second or 1)
    both = (full, moba)
    return (
        f"{model.family} {model.size}",
        str(model.batch),
        *(_rate(row) for row in (full, *sparse)),
        f"{gain:.1f}x",
        *(", ".join(cell(row) for row in both) for cell in (_mfu, _share, _busy, _memory)),
        *(_rate(row) for row in others),
    )


def _cells(row: TrainingRow) -> tuple[str, ...]:
    stored = ", checkpointing" if row.checkpointing else ""
    batch = f"{row.batch} x {length_name(row.tokens)}"
    name = (f"{row.family} {row.size}{stored}", batch, row.arm, row.layers, row.kind)
    if row.error or row.p50_ms is None:
        return (*name, row.error or "", *("",) * 6)
    times = (_rate(row), f"{row.p50_ms:.1f}", f"{row.tflops:.3g}")
    return (*name, *times, _mfu(row), _busy(row), _share(row), _memory(row))


def _rate(row: TrainingRow | None) -> str:
    return rate_name(row.tokens_per_second if row else None)


def _mfu(row: TrainingRow) -> str:
    return "-" if row.mfu is None else f"{row.mfu:.0%}"


def _share(row: TrainingRow) -> str:
    return "-" if row.attention_share is None else f"{row.attention_share:.0%}"


def _busy(row: TrainingRow) -> str:
    return "-" if row.busy_ms is None or row.p50_ms is None else f"{min(1.0, row.busy_ms / row.p50_ms):.0%}"


def _memory(row: TrainingRow) -> str:
    return "-" if row.peak_mb is None else f"{row.peak_mb / 1000:.1f}"


def _longest(row: TrainingRow | None) -> str:
    if row is None:
        return "-"
    return f"{length_name(row.tokens)}{'+' if row.limit == 'time' else ''}, {(row.p50_ms or 0) / 1000:.1f} s"
