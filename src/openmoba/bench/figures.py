"""The figures of a file of rows, and its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmoba.bench.parallel import cases as parallel
from openmoba.bench.parallel.cases import ParallelRow
from openmoba.bench.rows import columns, read_columns, read_rows
from openmoba.bench.table import Row, markdown
from openmoba.bench.training import table as training
from openmoba.bench.training.cases import TrainingRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(csv: Path, folder: Path) -> tuple[list[Path], str]:
    """Draw the figures of a file, such as time against length; return their files and the table.

    Raises:
        ValueError: the file holds no rows, or none of a benchmark.
    """
    from openmoba.records.figures import save

    names = set(read_columns(csv))
    kind = next((kind for kind in (TrainingRow, ParallelRow) if names == set(columns(kind))), Row)
    rows: Sequence[Any] = read_rows(csv, kind)
    if not rows:
        raise ValueError(f"{csv} holds no rows; run `openmoba bench attention`, or another, first")
    files: list[Path] = []
    for name, chart in _charts(kind, rows).items():
        files += save(chart(rows), folder / (f"{csv.stem}-{name}" if name else csv.stem))
    return files, _TABLES[kind](rows)


_TABLES: dict[type[Any], Callable[[Sequence[Any]], str]] = {
    Row: markdown,
    TrainingRow: training.markdown,
    ParallelRow: parallel.markdown,
}
"""The table of each kind of row."""


def _charts(kind: type[Any], rows: Sequence[Any]) -> Mapping[str, Callable[[Sequence[Any]], Figure]]:
    """Return what draws rows of a kind, by what the figure's name ends in."""
    if kind is TrainingRow:
        from openmoba.bench.training.chart import rate_chart

        return {"": rate_chart}
    if kind is ParallelRow:
        from openmoba.bench.parallel.chart import gain_chart

        return {"": gain_chart}
    from openmoba.bench.charts import speedup_chart, time_chart
    from openmoba.bench.decode import CHUNK, EAGER, GRAPH
    from openmoba.bench.decode_charts import prefill_chart, step_chart

    timed = {row.passes for row in rows}
    if timed.isdisjoint((GRAPH, EAGER, CHUNK)):
        return {"time": time_chart, "speedup": speedup_chart}
    charts = {"step": step_chart} if timed & {GRAPH, EAGER} else {}
    return charts | ({"prefill": prefill_chart} if CHUNK in timed else {})
