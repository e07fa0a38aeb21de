"""The figure of training: tokens per second over the size of the model, a line per attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from openmoba.bench.charts import name_lines
from openmoba.bench.rows import length_name, newest
from openmoba.bench.training.cases import TrainingRow
from openmoba.records.figures import BLUE, RED, chart_style

_OTHERS = ("#009988", "#EE7733", "#EE3377", "#33BBEE")
_MARKERS = "os^DvP"


def rate_chart(rows: Sequence[TrainingRow]) -> Figure:
    """Draw tokens per second over parameters, log-log, each line named at its end.

    Of every size and attention the fastest micro-batch of compiled layers, in the family and at the length of most
    rows; eager layers where none are compiled.
    """
    shown = _shown(rows)
    if not shown:
        raise ValueError("no row to draw: tokens per second over size need rows of kind 'loop' without an error")
    arms = sorted({row.arm for row in shown}, key=lambda arm: (arm == "full", arm))
    colours = dict(zip([arm for arm in arms if arm != "full"], (BLUE, *_OTHERS), strict=False)) | {"full": RED}
    with chart_style():
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="Parameters", ylabel="Tokens per second, optimizer included")
        for arm, marker in zip(arms, _MARKERS, strict=False):
            points = sorted((row.total, row.tokens_per_second) for row in shown if row.arm == arm)
            x, y = zip(*points, strict=True)
            label = "full attention" if arm == "full" else f"MoBA {arm}"
            axes.plot(x, y, color=colours[arm], marker=marker, linewidth=1.8, label=label)
        axes.set_xticks(*_ticks({row.size: row.total or 0 for row in shown}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e6:g} M" if y >= 1e6 else f"{y / 1e3:g} K"))
        name_lines(axes)
        axes.set_title(_title(shown[-1]), fontsize=11)
    return figure


def _shown(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    timed = [row for row in newest(rows) if row.kind == "loop" and row.tokens_per_second and not row.checkpointing]
    timed = [row for row in timed if row.layers == "compiled"] or timed
    kinds = [(row.family, row.tokens) for row in timed]
    timed = [row for row in timed if (row.family, row.tokens) == max(kinds, key=kinds.count)]
    best: dict[tuple[str, str], TrainingRow] = {}
    for row in sorted(timed, key=lambda row: row.tokens_per_second or 0):
        best[row.size, row.arm] = row
    return list(best.values())


def _ticks(sizes: Mapping[str, int]) -> tuple[list[int], list[str]]:
    """Set a tick at every size, and a name where there is room beside the one before."""
    places, names, named = sorted(sizes.items(), key=lambda item: item[1]), [], 0.0
    for size, total in places:
        has_room = total > 1.3 * named
        names.append(size.upper() if has_room else "")
        named = total if has_room else named
    return [total for _, total in places], names


def _title(row: TrainingRow) -> str:
    precision = "fp32 weights, bf16 autocast" if row.dtype == "bfloat16" else row.dtype
    return f"{row.device}, {row.family}, windows of {length_name(row.tokens)} tokens, {precision}, {row.layers} layers"
