"""Figures of the decode benchmark: time of a step over cached tokens, and of a prefill chunk over its position."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from openmoba.bench.contenders import contender_label
from openmoba.bench.decode import CHUNK, EAGER, GRAPH
from openmoba.bench.rows import length_name, newest
from openmoba.bench.table import Row, dense_names
from openmoba.records.figures import DENSE, chart_style, setting_looks


def step_chart(rows: Sequence[Row]) -> Figure:
    """Draw the median time of a decoding step over cached tokens, a panel per batch; graphs, else eager."""
    rows = _measured(rows, GRAPH) or _measured(rows, EAGER)
    batches = sorted({row.batch for row in rows})
    with chart_style():
        figure = Figure(figsize=(1.0 + 4.8 * len(batches), 4.4), layout="constrained")
        for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            panel = [row for row in rows if row.batch == batch]
            _settings(axes, panel)
            dense: dict[int, float] = {}
            for row in panel:
                if row.block_size is None and row.p50_ms is not None:
                    dense[row.tokens] = min(row.p50_ms, dense.get(row.tokens, row.p50_ms))
            if dense:
                names = "; ".join(map(contender_label, dense_names([row for row in panel if row.block_size], panel)))
                x, y = zip(*sorted(dense.items()), strict=True)
                axes.plot(x, y, label=fill(f"dense, {names}", 36), **DENSE.options())
            axes.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="Cached tokens")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            _finish(axes, panel)
        figure.supylabel("Time per decoding step (ms)", fontsize=11)
        figure.suptitle(_title(rows[0]), fontsize=11)
    return figure


def prefill_chart(rows: Sequence[Row]) -> Figure:
    """Draw the median time of a chunk of the prompt over the tokens at its end."""
    rows = _measured(rows, CHUNK)
    with chart_style():
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        _settings(axes, rows)
        chunk = min(row.tokens for row in rows)
        axes.set(xlabel="Tokens at the end of the chunk", ylabel=f"Time per chunk of {length_name(chunk)} tokens (ms)")
        axes.set_ylim(bottom=0)
        _finish(axes, rows, most=8)
        axes.set_title(_title(rows[0]), fontsize=11)
    return figure


def _measured(rows: Sequence[Row], passes: str) -> list[Row]:
    return [row for row in newest(rows) if row.passes == passes and row.p50_ms]


def _settings(axes: Axes, rows: Sequence[Row]) -> None:
    looks = setting_looks((row.block_size, row.top_k) for row in rows if row.block_size and row.top_k)
    for (block_size, top_k), look in looks.items():
        points = sorted((row.tokens, row.p50_ms) for row in rows if (row.block_size, row.top_k) == (block_size, top_k))
        axes.plot(*zip(*points, strict=True), label=f"openmoba {block_size}/{top_k}", **look.options())


def _finish(axes: Axes, rows: Sequence[Row], most: int = 12) -> None:
    lengths = sorted({row.tokens for row in rows})
    shown = lengths[:: -(-len(lengths) // most)] if len(lengths) > most else lengths
    axes.set_xticks(shown, [length_name(tokens) for tokens in shown], fontsize=9)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.legend()


def _title(row: Row) -> str:
    return f"{row.device}, {row.dtype}, {row.heads} query and {row.kv_heads} key/value heads, width {row.head_dim}"
