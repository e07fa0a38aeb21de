"""The figure of one sequence over several devices: how many times faster than one they are, by way."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from openmoba.bench.parallel.cases import ParallelRow
from openmoba.bench.rows import length_name, newest
from openmoba.records.figures import BLUE, GREY, chart_style, new_figure

_WAYS = {("heads", "contiguous"): BLUE, ("keys", "head-tail"): "#009988", ("keys", "contiguous"): "#EE7733"}


def gain_chart(rows: Sequence[ParallelRow]) -> Figure:
    """Draw the speed-up of attention, both passes, over one device: a group of bars per setting and length."""
    shown = [
        row for row in newest(rows) if row.kind == "attention" and row.passes == "forward+backward" and row.speedup
    ]
    if not shown:
        raise ValueError("no row to draw: speed-ups need rows of attention on one device and on several")
    ranks = max(row.ranks for row in shown)
    shown = [row for row in shown if row.ranks == ranks]
    groups = sorted({(row.block_size, row.top_k, row.tokens) for row in shown})
    ways = [way for way in _WAYS if way in {(row.way, row.layout) for row in shown}]
    width = 0.8 / len(ways)
    with chart_style():
        figure = new_figure()
        axes = figure.add_subplot()
        for i, way in enumerate(ways):
            its = [row for row in shown if (row.way, row.layout) == way]
            gains = {(row.block_size, row.top_k, row.tokens): row.speedup or 0 for row in its}
            places = [groups.index(group) + (i - (len(ways) - 1) / 2) * width for group in gains]
            bars = axes.bar(places, list(gains.values()), 0.94 * width, color=_WAYS[way], label=f"by {', '.join(way)}")
            around = [withStroke(linewidth=3, foreground="white")]
            axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2, path_effects=around)
        axes.axhline(ranks, color=GREY, linewidth=1, linestyle="--")
        names = [f"{block} / {top_k}\n{length_name(tokens)}" for block, top_k, tokens in groups]
        axes.set_xticks(range(len(groups)), names)
        axes.set(xlabel="Block size / top-k, tokens", ylabel="Times faster than one")
        first = shown[0]
        heads = f"{first.heads}/{first.kv_heads} heads of width {first.head_dim}, {first.dtype}"
        axes.set_title(f"Forward and backward on {ranks} {first.device}\n{heads}", fontsize=11)
        figure.legend(loc="outside lower center", ncols=len(ways))
    return figure
