"""`openmoba bench plot`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from openmoba.bench.table import Row, markdown, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """Draw a benchmark's figures, such as time against length and speed-up over dense, and print its table."""

    csv: tyro.conf.Positional[Path]
    """File written by `openmoba bench attention` or `openmoba bench decode`."""
    out: Path | None = None
    """Folder of the figures; left out, that of the file."""

    def run(self) -> None:
        """Draw, and print."""
        from openmoba.lab.figures import save

        rows = read_rows(self.csv)
        if not rows:
            raise ValueError(f"{self.csv} holds no rows; run `openmoba bench attention` or `decode` first")
        folder = self.out or self.csv.parent
        for name, chart in _charts(rows).items():
            print(*save(chart(rows), folder / f"{self.csv.stem}-{name}"), sep="\n")
        print(markdown(rows))


def _charts(rows: Sequence[Row]) -> Mapping[str, Callable[[Sequence[Row]], Figure]]:
    from openmoba.bench.charts import speedup_chart, time_chart
    from openmoba.bench.decode import CHUNK, EAGER, GRAPH
    from openmoba.bench.decode_charts import prefill_chart, step_chart

    timed = {row.passes for row in rows}
    if timed.isdisjoint((GRAPH, EAGER, CHUNK)):
        return {"time": time_chart, "speedup": speedup_chart}
    charts = {"step": step_chart} if timed & {GRAPH, EAGER} else {}
    return charts | ({"prefill": prefill_chart} if CHUNK in timed else {})
