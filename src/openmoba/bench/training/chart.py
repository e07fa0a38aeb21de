"""The figure of training: tokens per second over the size of the model, a line per attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from openmoba.bench.charts import name_lines
from openmoba.bench.rows import length_name, newest
from openmoba.bench.training.cases import TrainingRow
from openmoba.records.figures import DENSE, chart_style, setting_looks

_LAYERS = ("graphed", "compiled", "eager")
"""Ways to run layers, what users get first."""


def rate_chart(rows: Sequence[TrainingRow]) -> Figure:
    """Draw tokens per second over parameters, log-log, each line named at its end.

    Of every size and attention the fastest micro-batch, in the family and at the length of most rows: of layers in CUDA
    graphs, which is how they are trained; else of compiled ones, whose markers are hollow where others are in graphs.
    """
    shown = _shown(rows)
    if not shown:
        raise ValueError("no row to draw: tokens per second over size need rows of kind 'loop' without an error")
    looks = setting_looks((row.block_size, row.top_k) for row in shown if row.block_size and row.top_k)
    best = min((row.layers for row in shown), key=_LAYERS.index)
    with chart_style():
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="Parameters", ylabel="Tokens per second, optimizer included")
        for arm in sorted({row.arm for row in shown}):
            own = sorted((row for row in shown if row.arm == arm), key=lambda row: row.total or 0)
            first = own[0]
            look = looks.get((first.block_size or 0, first.top_k or 0), DENSE)
            x, y = [row.total or 0 for row in own], [row.tokens_per_second or 0.0 for row in own]
            label = f"full attention\n({_dense(own)})" if arm == "full" else f"MoBA {arm}"
            axes.plot(x, y, label=label, **look.options())
            others = [place for place, row in enumerate(own) if row.layers != best]
            hollow = {**look.options(), "linestyle": "none", "markerfacecolor": "white"}
            axes.plot([x[i] for i in others], [y[i] for i in others], **hollow)
        axes.set_xticks(*_ticks({row.size: row.total or 0 for row in shown}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e6:g} M" if y >= 1e6 else f"{y / 1e3:g} K"))
        name_lines(axes)
        axes.set_title(_title(shown, best), fontsize=11)
    return figure


def _shown(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    timed = [row for row in newest(rows) if row.kind == "loop" and row.tokens_per_second and not row.checkpointing]
    kinds = [(row.family, row.tokens) for row in timed]
    timed = [row for row in timed if (row.family, row.tokens) == max(kinds, key=kinds.count)]
    best: dict[tuple[str, str], TrainingRow] = {}
    for row in sorted(timed, key=lambda row: (-_LAYERS.index(row.layers), row.tokens_per_second or 0)):
        best[row.size, row.arm] = row
    return list(best.values())


def _dense(rows: Sequence[TrainingRow]) -> str:
    """Say whose kernels full attention ran, as far as the rows say."""
    kernels = {row.attention_kernel for row in rows if row.attention_kernel}
    return "SDPA/cuDNN" if kernels and all(kernel.startswith("cudnn") for kernel in kernels) else "SDPA"


def _ticks(sizes: Mapping[str, int]) -> tuple[list[int], list[str]]:
    """Set a tick at every size, and a name where there is room beside the one before."""
    places, names, named = sorted(sizes.items(), key=lambda item: item[1]), [], 0.0
    for size, total in places:
        has_room = total > 1.3 * named
        names.append(size.upper() if has_room else "")
        named = total if has_room else named
    return [total for _, total in places], names


def _title(shown: Sequence[TrainingRow], best: str) -> str:
    row, names = shown[-1], {"graphed": "layers in CUDA graphs"}
    precision = "fp32 weights, bf16 autocast" if row.dtype == "bfloat16" else row.dtype
    others = dict.fromkeys(row.layers for row in shown if row.layers != best)
    ways = [names.get(best, f"{best} layers"), *(f"hollow: {way} alone" for way in others)]
    return f"{row.device}, {row.family}, windows of {length_name(row.tokens)} tokens\n{precision}, {'; '.join(ways)}"
