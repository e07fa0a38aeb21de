"""`openmoba bench plot`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from openmoba.bench.rows import columns, read_columns, read_rows
from openmoba.bench.table import Row, markdown
from openmoba.bench.training import table as training
from openmoba.bench.training.cases import TrainingRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """Draw a benchmark's figures, such as time against length and speed-up over dense, and print its table."""

    csv: tyro.conf.Positional[Path]
    """File written by `openmoba bench attention`, `decode` or `training`."""
    out: Path | None = None
    """Folder of the figures; left out, that of the file."""

    def run(self) -> None:
        """Draw, and print."""
        from openmoba.records.figures import save

        of_training = set(read_columns(self.csv)) == set(columns(TrainingRow))
        rows: Sequence[Any] = read_rows(self.csv, TrainingRow if of_training else Row)
        if not rows:
            raise ValueError(f"{self.csv} holds no rows; run `openmoba bench attention`, `decode` or `training` first")
        folder = self.out or self.csv.parent
        for name, chart in (_training_charts() if of_training else _charts(rows)).items():
            path = folder / (f"{self.csv.stem}-{name}" if name else self.csv.stem)
            print(*save(chart(rows), path), sep="\n")
        print(training.markdown(rows) if of_training else markdown(rows))


Charts = Mapping[str, "Callable[[Sequence[Any]], Figure]"]


def _training_charts() -> Charts:
    from openmoba.bench.training.chart import rate_chart

    return {"": rate_chart}


def _charts(rows: Sequence[Row]) -> Charts:
    from openmoba.bench.charts import speedup_chart, time_chart
    from openmoba.bench.decode import CHUNK, EAGER, GRAPH
    from openmoba.bench.decode_charts import prefill_chart, step_chart

    timed = {row.passes for row in rows}
    if timed.isdisjoint((GRAPH, EAGER, CHUNK)):
        return {"time": time_chart, "speedup": speedup_chart}
    charts = {"step": step_chart} if timed & {GRAPH, EAGER} else {}
    return charts | ({"prefill": prefill_chart} if CHUNK in timed else {})
