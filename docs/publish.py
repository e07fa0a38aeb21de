"""Publish studies: gather their records below results/, draw figures and reports anew, and write the documents' tables.

    python docs/publish.py runs/chart-a runs/chart-b
    python docs/publish.py runs/chart-b elsewhere/chart-b

A folder becomes results/h200/study/NAME by its own name; folders of one name are pieces of one study, made by several
calls or on several machines. Finished runs are taken, as the few small files that a report is made of, without weights,
and what `openmoba evaluate needle` and `openmoba bench training` wrote beside them. Do it again whenever more runs are
finished.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import tables

from openmoba.lab.measure.compute import SIX_ND
from openmoba.lab.measure.needle_page import draw_needles, read_needles
from openmoba.lab.run_files import CONFIG_FILE, FAILED_FILE, IDENTITY_FILE, METRICS_FILE, RECIPE_FILE, RESULT_FILE
from openmoba.lab.study.outcomes import read_outcomes
from openmoba.lab.study.rates import RATES_FILE
from openmoba.lab.study.recipe import recipe_of
from openmoba.lab.study.report import write_report
from openmoba.lab.study.results import NEEDLES

RECORDS = (CONFIG_FILE, IDENTITY_FILE, METRICS_FILE, RESULT_FILE)
"""What a finished run is, without weights."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="folders of studies, or pieces of them")
    options = parser.parse_args(arguments)
    for name in dict.fromkeys(study.resolve().name for study in options.studies):
        pieces = [study for study in options.studies if study.resolve().name == name]
        print(*publish(pieces, tables.ROOT / tables.STUDIES.parent / name), sep="\n")
    tables.main()


def publish(pieces: Sequence[Path], out: Path) -> list[Path]:
    """Gather the pieces of a study in `out`, beside what is there, and write its report; returns report and figures."""
    gather(pieces, out)
    if (out / NEEDLES).exists():
        draw_needles(read_needles(out / NEEDLES), (out / NEEDLES).with_suffix(""))
    return write_report(recipe_of(out), out, SIX_ND)


def gather(pieces: Sequence[Path], out: Path) -> None:
    """Put copies of the records of the finished runs of a study's pieces into `out`, and what says that one diverged.

    Raises:
        ValueError: pieces of different recipes, or a run that is finished twice with other records; nothing was copied.
    """
    found: dict[str, Path] = {}
    for piece in (*([out] if (out / RECIPE_FILE).exists() else []), *pieces):
        recipe = recipe_of(piece)
        read_outcomes(recipe, piece)  # damaged records are an error
        found.setdefault(RECIPE_FILE, piece)
        for name in (RECIPE_FILE, *(f"{run.name}/{RESULT_FILE}" for run in recipe.runs)):
            first = found.setdefault(name, piece) if (piece / name).exists() else piece
            if (piece / name).exists() and (first / name).read_bytes() != (piece / name).read_bytes():
                raise ValueError(f"{first / name} and {piece / name} differ; delete the one that does not count")
    for name, piece in found.items():
        for record in RECORDS if name != RECIPE_FILE else (RECIPE_FILE,):
            _copy(Path(name).with_name(record), piece, out)
    for run in recipe.runs:
        failed = Path(run.name) / FAILED_FILE
        if f"{run.name}/{RESULT_FILE}" in found:  # with the same settings it went well elsewhere
            (out / failed).unlink(missing_ok=True)
        elif holder := next((piece for piece in pieces if (piece / failed).exists()), None):
            _copy(failed, holder, out)
    for piece in pieces:
        for name in (NEEDLES, RATES_FILE):
            _copy(Path(name), piece, out)


def _copy(file: Path, piece: Path, out: Path) -> None:
    """Put a copy of a file that a piece has into its place in `out`, unless it is that file."""
    source, target = piece / file, out / file
    if source.exists() and source.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
