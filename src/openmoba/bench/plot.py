"""`openmoba bench plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Plot:
    """Draw a benchmark's figures, such as time against length and speed-up over dense, and print its table."""

    csv: tyro.conf.Positional[Path]
    """File written by `openmoba bench attention`, `decode`, `training` or `parallel`."""
    out: Path | None = None
    """Folder of the figures; left out, that of the file."""

    def run(self) -> None:
        """Draw, and print."""
        from openmoba.bench.figures import draw

        files, table = draw(self.csv, self.out or self.csv.parent)
        print(*files, table, sep="\n")
