"""The look of every chart, and how it is written.

The colours are of Paul Tol's "vibrant" scheme, which survives colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from openmoba.records.disk import write_bytes

TITLE_WIDTH = 68  # characters that fit on one line
LEGEND_WIDTH = 86  # characters of a legend's row, eight for each handle
BLUE, RED, GREY = "#0077BB", "#CC3311", "#666666"
HALO = [withStroke(linewidth=2.5, foreground="white")]
"""Path effects of a name or a number that stands over curves."""


class Look(NamedTuple):
    """How a curve is drawn; colour and marker each tell it from the others, so that it survives grey printing."""

    colour: str
    marker: str
    line: Any = "-"

    def options(self, line_width: float = 1.6, marker_size: float = 5) -> dict[str, Any]:
        """Return what matplotlib's `plot` takes."""
        return {
            "color": self.colour, "marker": self.marker, "linestyle": self.line, "linewidth": line_width,
            "markersize": marker_size,
        }  # fmt: skip


DENSE = Look(RED, "s")
_BLOCKS = {
    16: Look("#AA4499", "X"),
    32: Look("#DDAA33", "p"),
    64: Look("#332288", "P"),
    128: Look(BLUE, "o"),
    256: Look("#33BBEE", "s"),
    512: Look("#009988", "^"),
    1024: Look("#999933", "h"),
    2048: Look("#882255", "D"),
    4096: Look("#EE7733", "v"),
}
"""Tokens of a block -> the look of MoBA's curves with it, in every benchmark; of Paul Tol's schemes."""
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1)))


def setting_looks(settings: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Look]:
    """Choose the look of MoBA's settings, block size and top-k: by the block; the line tells those of one block apart.

    A block of another size looks like the nearest that has a look.
    """
    looks: dict[tuple[int, int], Look] = {}
    for block_size, top_k in sorted(set(settings)):
        nearest = min(_BLOCKS, key=lambda known: abs(log2(known) - log2(block_size)))
        same = sum(look.colour == _BLOCKS[nearest].colour for look in looks.values())
        looks[block_size, top_k] = _BLOCKS[nearest]._replace(line=LINES[same % len(LINES)])
    return looks


STYLE: Any = {  # matplotlib types the keys of its settings one by one
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "openmoba",
}


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.png and `path`.svg, each in one step; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        drawn, file = BytesIO(), path.with_name(f"{path.name}.{kind}")
        with chart_style():
            figure.savefig(drawn, format=kind, **options)
        write_bytes(file, drawn.getvalue())
        files.append(file)
    return files


@contextmanager
def chart_style() -> Iterator[None]:
    """Use the settings that all charts are drawn with."""
    with mpl.rc_context(STYLE):
        yield


def new_figure(height: float = 4.8) -> Figure:
    """Return an empty figure as wide as a page, `height` inches high."""
    return Figure(figsize=(7.2, height), layout="constrained")


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend of `axes` under the figure, in as many columns as its names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    columns = next((count for count in (4, 3, 2) if _width(names, count) <= LEGEND_WIDTH), 1)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)


def _width(names: Sequence[str], columns: int) -> int:
    """Return the characters that a legend in so many columns, filled one after the other, takes."""
    longer, rows = len(names) % columns, len(names) // columns
    ends = [rows * column + min(column, longer) for column in range(columns + 1)]
    return sum(8 + max(map(len, names[begin:end]), default=0) for begin, end in pairwise(ends))
