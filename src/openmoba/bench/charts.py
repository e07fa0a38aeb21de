"""Figures of a benchmark: time against length, and speed-up over the fastest dense attention.

One panel per head width and kind of pass. A contender has a colour and a marker, MoBA's settings a line style.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from openmoba.bench.contenders import CONTENDERS
from openmoba.bench.rows import length_name, newest
from openmoba.bench.table import Row
from openmoba.lab.figures import BLUE, GREY, RED, STYLE

LOOKS = {
    "moba": (BLUE, "o"),
    "sdpa_cudnn": (RED, "s"),
    "sdpa": (RED, "s"),
    "sdpa_flash": (GREY, "D"),
    "fa4": ("#EE3377", "P"),
    "flash_moba": ("#EE7733", "^"),
    "flex": ("#009988", "v"),
}
LINES = ("-", "--", ":", "-.", (0, (5, 1)))


def time_chart(rows: Sequence[Row]) -> Figure:
    """Median time of one sequence over its length, log-log, all contenders; random routing."""
    times = {row: row.p50_ms / row.batch for row in _main_slice(rows) if row.p50_ms is not None}
    return _chart(times, "Time per sequence (ms)")


def speedup_chart(rows: Sequence[Row]) -> Figure:
    """How many times faster than the fastest dense attention of the same commit; random routing."""
    speedups = {row: row.speedup for row in _main_slice(rows) if row.speedup is not None}
    figure = _chart(speedups, "Times faster than the fastest dense attention")
    for axes in figure.axes:
        axes.axhline(1.0, color=GREY, linewidth=1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    return figure


def _main_slice(rows: Sequence[Row]) -> list[Row]:
    """Random routing, the newest rows on the machine of the last, in the dtype and heads of most.

    A head width measured at one length is no curve; it is left out beside others that are.
    """
    rows = [row for row in newest(rows) if row.routing in (None, "random")]
    kinds = Counter(_kind(row) for row in rows)
    rows = [row for row in rows if _kind(row) == kinds.most_common(1)[0][0]]
    lengths = Counter(width for width, _ in {(row.head_dim, row.tokens) for row in rows})
    curves = {width for width, count in lengths.items() if count > 1} or set(lengths)
    return [row for row in rows if row.head_dim in curves]


def _kind(row: Row) -> tuple[str, int, int]:
    return (row.dtype, row.heads, row.kv_heads)


def _chart(values: Mapping[Row, float], label: str) -> Figure:
    if not values:
        raise ValueError(f"no row to draw: {label!r} needs rows of MoBA and of dense attention without an error")
    passes = sorted({row.passes for row in values})
    widths = sorted({row.head_dim for row in values})
    settings = sorted({(row.block_size, row.top_k) for row in values if row.block_size is not None})
    lines = {(None, None): "-"} | dict(zip(settings, cycle(LINES)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 5.4 * len(widths), 0.9 + 3.9 * len(passes)), layout="constrained")
        panels = figure.subplots(len(passes), len(widths), sharex=True, squeeze=False)
        for row_of_panels, kind in zip(panels, passes, strict=True):
            for axes, width in zip(row_of_panels, widths, strict=True):
                part = {row: y for row, y in values.items() if (row.passes, row.head_dim) == (kind, width)}
                _panel(axes, part, lines)
                axes.set_title(f"{kind.replace('+', ' + ')}, head width {width}")
        for axes in panels[-1]:
            axes.set_xlabel("Tokens")
        _ticks(panels[-1], sorted({row.tokens for row in values}))
        figure.supylabel(label, fontsize=11)
        figure.suptitle(_title(next(iter(values))), fontsize=11)
        _legend(figure, [_label(name, setting) for name in LOOKS for setting in lines])
    return figure


def _panel(axes: Axes, values: Mapping[Row, float], lines: Mapping[Any, Any]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for name, (colour, marker) in LOOKS.items():
        for setting, line in lines.items():
            points = {
                row.tokens: y
                for row, y in values.items()
                if row.contender == name and (row.block_size, row.top_k) == setting
            }
            if points:
                x, y = zip(*sorted(points.items()), strict=True)
                look: Any = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.6}
                axes.plot(x, y, label=_label(name, setting), **look)


def _label(name: str, setting: tuple[int | None, int | None]) -> str:
    block_size, top_k = setting
    return CONTENDERS[name].label + ("" if block_size is None else f" {block_size}/{top_k}")


def _legend(figure: Figure, order: Sequence[str]) -> None:
    """One legend for all panels, its labels in `order`."""
    named = [panel.get_legend_handles_labels() for panel in figure.axes]
    lines = {text: line for handles, texts in named for line, text in zip(handles, texts, strict=True)}
    shown = [text for text in order if text in lines]
    figure.legend([lines[text] for text in shown], shown, loc="outside right upper")


def _ticks(panels: Sequence[Axes], lengths: Sequence[int]) -> None:
    """A tick at every length; a name where there is room beside the one before: at most nine of them."""
    apart = (lengths[-1] / lengths[0]) ** (1 / 8)
    names, named = [], 0
    for tokens in lengths:
        has_room = tokens >= apart * named
        names.append(length_name(tokens) if has_room else "")
        named = tokens if has_room else named
    for axes in panels:
        axes.set_xticks(lengths, names, fontsize=9)
        axes.xaxis.set_minor_locator(NullLocator())


def _title(row: Row) -> str:
    heads = f"{row.heads} heads"
    if row.heads != row.kv_heads:
        heads = f"{row.heads} query and {row.kv_heads} key/value heads"
    return f"{row.device}, {row.dtype}, {heads}, causal"
