"""The look of every chart, and how it is written.

The colours are of Paul Tol's "vibrant" scheme, which survives colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmoba.records.disk import write_bytes

TITLE_WIDTH = 68  # characters that fit on one line
BLUE, RED, GREY = "#0077BB", "#CC3311", "#666666"

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
    columns = min(4, max(1, 84 // (8 + max(map(len, names)))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)
