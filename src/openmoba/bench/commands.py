"""`openmoba bench plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from openmoba.bench.table import markdown, read_rows


@dataclass(frozen=True)
class Plot:
    """Draw a benchmark's figures, time against length and speed-up over dense, and print its table."""

    csv: tyro.conf.Positional[Path]
    """File written by `openmoba bench attention`."""
    out: Path | None = None
    """Folder of the figures; left out, that of the file."""

    def run(self) -> None:
        """Draw, and print."""
        from openmoba.bench.charts import speedup_chart, time_chart
        from openmoba.lab.figures import save

        rows = read_rows(self.csv)
        if not rows:
            raise ValueError(f"{self.csv} holds no rows; run `openmoba bench attention` first")
        folder = self.out or self.csv.parent
        for name, chart in (("time", time_chart), ("speedup", speedup_chart)):
            print(*save(chart(rows), folder / f"{self.csv.stem}-{name}.png"), sep="\n")
        print(markdown(rows))
