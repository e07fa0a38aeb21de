"""Figures of the attention benchmark: speed-up over dense attention, and time against length.

MoBA's settings have a colour each, by the size of their blocks; other contenders have one of their own, and a line
style per setting. Both differ in their markers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from openmoba.bench.cases import PASSES
from openmoba.bench.contenders import contender_label
from openmoba.bench.rows import length_name, newest
from openmoba.bench.table import Row, compared, dense_names
from openmoba.records.figures import DENSE, GREY, HALO, LINES, Look, chart_style, setting_looks

# Of Paul Tol's schemes; in grey, they and the markers still differ.
_OTHERS = {
    "sdpa_cudnn": DENSE,
    "sdpa": DENSE,
    "sdpa_flash": Look(GREY, "D"),
    "fa4": Look("#EE3377", "P"),
    "given": Look("#117733", "<"),
    "flash_moba": Look("#666633", "X"),
    "flex": Look("#BBBBBB", ">"),
    "sdpa_mask": Look("#DDAA33", "h"),
}


class Line(NamedTuple):
    """One contender with one of MoBA's settings, None for dense attention."""

    contender: str
    block_size: int | None
    top_k: int | None

    @property
    def label(self) -> str:
        """Its name in a figure."""
        setting = "" if self.block_size is None else f" {self.block_size}/{self.top_k}"
        return contender_label(self.contender) + setting


def time_chart(rows: Sequence[Row]) -> Figure:
    """Draw the median time of one sequence over its length, log-log; a panel per width and kind of pass."""
    times = {row: row.p50_ms / row.batch for row in _main_slice(rows) if row.p50_ms is not None}
    _check(times, "times need rows of any contender")
    passes = [kind for kind in PASSES if kind in {row.passes for row in times}]
    widths = sorted({row.head_dim for row in times})
    looks = _looks(times)
    with chart_style():
        figure = Figure(figsize=(1.2 + 5.4 * len(widths), 0.9 + 3.9 * len(passes)), layout="constrained")
        panels = figure.subplots(len(passes), len(widths), sharex=True, squeeze=False)
        for row_of_panels, kind in zip(panels, passes, strict=True):
            for axes, width in zip(row_of_panels, widths, strict=True):
                part = {row: y for row, y in times.items() if (row.passes, row.head_dim) == (kind, width)}
                _curves(axes, part, looks)
                axes.set_title(f"{_passes(kind)}, head width {width}")
        for axes in panels[-1]:
            axes.set_xlabel("Tokens")
        _ticks(panels[-1], sorted({row.tokens for row in times}))
        figure.supylabel("Time per sequence (ms)", fontsize=11)
        figure.suptitle(_title(next(iter(times))), fontsize=11)
        _legend(figure, [line.label for line in looks])
    return figure


def speedup_chart(rows: Sequence[Row]) -> Figure:
    """Draw how many times faster MoBA is than the fastest dense attention timed, which the axis names.

    One panel, of the widest heads and both passes where they were timed. A line is named at its end.
    """
    main = _main_slice(rows)
    speedups = {row: row.speedup for row in (compared(row, main) for row in main) if row.speedup is not None}
    speedups = {row: y for row, y in speedups.items() if row.contender == "moba"}
    _check(speedups, "speed-ups need rows of MoBA and of dense attention")
    shown = max((PASSES.index(row.passes), row.head_dim) for row in speedups)
    speedups = {row: y for row, y in speedups.items() if (PASSES.index(row.passes), row.head_dim) == shown}
    dense = dict.fromkeys(contender_label(name) for name in dense_names(speedups, main))
    with chart_style():
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        _curves(axes, speedups, _looks(speedups))
        axes.axhline(1.0, color=GREY, linewidth=1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="Tokens", ylabel=f"Times faster than dense attention\n({'; '.join(dense)})")
        _ticks([axes], sorted({row.tokens for row in speedups}))
        name_lines(axes)
        first = next(iter(speedups))
        what = f"{_passes(first.passes)}, head width {first.head_dim}, block size / top-k"
        axes.set_title(f"{what}\n{_title(first)}", fontsize=11)
    return figure


def _main_slice(rows: Sequence[Row]) -> list[Row]:
    """Pick random routing, the newest rows on the machine of the last, in the dtype and heads of most.

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


def _check(values: Mapping[Row, float], needs: str) -> None:
    if not values:
        raise ValueError(f"no row to draw: {needs} without an error")


def _line(row: Row) -> Line:
    return Line(row.contender, row.block_size, row.top_k)


def _looks(rows: Iterable[Row]) -> dict[Line, Look]:
    """Choose how each line is drawn, MoBA's first."""
    lines = {_line(row) for row in rows}
    settings = [(line.block_size, line.top_k) for line in lines if line.contender == "moba"]
    own = setting_looks((block, top_k) for block, top_k in settings if block and top_k)
    looks = {Line("moba", *setting): look for setting, look in own.items()}
    for name, look in _OTHERS.items():
        others = sorted(line for line in lines if line.contender == name)
        looks |= {line: look._replace(line=style) for line, style in zip(others, LINES, strict=False)}
    return looks


def _curves(axes: Axes, values: Mapping[Row, float], looks: Mapping[Line, Look]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for line, look in looks.items():
        points = {row.tokens: y for row, y in values.items() if _line(row) == line}
        if points:
            x, y = zip(*sorted(points.items()), strict=True)
            axes.plot(x, y, label=line.label, **look.options())


def name_lines(axes: Axes) -> None:
    """Write each line's label beside its last point, moved up or down where two would touch."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    ends = sorted((line.get_xydata()[-1].tolist(), line) for line in named)  # type: ignore[union-attr, index]
    ends.sort(key=lambda end: end[0][1])
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.052
    heights = list(spread([y for (_, y), _ in ends], gap))
    for ((x, _), line), y in zip(ends, heights, strict=True):
        axes.annotate(
            str(line.get_label()), (x, y), xytext=(9, 0), textcoords="offset points", va="center",
            color=line.get_color(), annotation_clip=False, path_effects=HALO,
        )  # fmt: skip


def spread(values: Sequence[float], ratio: float) -> Iterator[float]:
    """Move ascending values apart by at least `ratio`; groups that touch stay around their middle."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _bottom(groups[-1], ratio) < _bottom(groups[-2], ratio) * ratio ** len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        bottom = _bottom(group, ratio)
        yield from (bottom * ratio**i for i in range(len(group)))


def _bottom(group: Sequence[float], ratio: float) -> float:
    """Return where a group of values begins if they are `ratio` apart and keep their geometric mean."""
    product = 1.0
    for i, value in enumerate(group):
        product *= (value / ratio**i) ** (1 / len(group))
    return product


def _legend(figure: Figure, order: Sequence[str]) -> None:
    """Draw one legend for all panels, its labels in `order`."""
    named = [panel.get_legend_handles_labels() for panel in figure.axes]
    lines = {text: line for handles, texts in named for line, text in zip(handles, texts, strict=True)}
    shown = [text for text in order if text in lines]
    figure.legend([lines[text] for text in shown], shown, loc="outside right upper")


def _ticks(panels: Sequence[Axes], lengths: Sequence[int]) -> None:
    """Set a tick at every length, and a name where there is room beside the one before: at most nine."""
    apart = (lengths[-1] / lengths[0]) ** (1 / 8)
    names, named = [], 0
    for tokens in lengths:
        has_room = tokens >= apart * named
        names.append(length_name(tokens) if has_room else "")
        named = tokens if has_room else named
    for axes in panels:
        axes.set_xticks(lengths, names, fontsize=9)
        axes.xaxis.set_minor_locator(NullLocator())


def _passes(kind: str) -> str:
    return kind.replace("+", " + ")


def _title(row: Row) -> str:
    heads = f"{row.heads} heads"
    if row.heads != row.kv_heads:
        heads = f"{row.heads} query and {row.kv_heads} key/value heads"
    return f"{row.device}, {row.dtype}, {heads}, causal"
