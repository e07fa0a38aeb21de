"""Tables of docs/study.md: what its recipes and a search for needles cost on one GPU; vocabularies of its corpus."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from openmoba.bench.rows import markdown_table, read_rows
from openmoba.bench.training.cases import TrainingRow
from openmoba.lab.measure.commands import Needle
from openmoba.lab.study.recipe import Recipe, read_recipe
from openmoba.lab.train.plan import SHARE, planned_work

ORDER = ("context", "candidates", "chart-b", "chart-a", "context-novels")
"""The recipes in the order in which their questions build on each other."""
EMBEDDING_WIDTHS = {"2 M": 192, "32 M": 512}
"""Parameters without embeddings -> width, of the smallest and the largest model of the ladder."""
NEEDLE = ("14m", 2**15)
"""Size of a model in which needles are looked for, and the longest of the lengths."""


def costs(root: Path) -> str:
    """Say how many runs each recipe has and how long they train, in minutes of the GPU that `bench training` ran on."""
    file = root / "results" / "h200" / "training.csv"
    recipes = [root / "recipes" / f"{name}.toml" for name in ORDER]
    if not file.exists() or not all(path.exists() for path in recipes):
        return ""
    rows = [row for row in read_rows(file, TrainingRow) if row.matrix_tflops]
    rate = SHARE["cuda"] * 1e12 * statistics.median(row.matrix_tflops for row in rows)
    heads = ("recipe", "question", "runs", "minutes", "of these one seed", "longest run")
    cells = [_cost(path, read_recipe(path), rate) for path in recipes]
    return "\n".join(
        (*markdown_table(heads, cells), "", f"Minutes of one {rows[0].device}, compiling not counted.", "")
    )


def needle(root: Path) -> str:
    """Say how many tokens a search for needles reads of one model, and how long that takes at the speed of training."""
    file = root / "results" / "h200" / "training.csv"
    rows = read_rows(file, TrainingRow) if file.exists() else []
    same = [row for row in rows if (row.size, row.tokens, row.kind, row.block_size) == (*NEEDLE, "loop", None)]
    rates = [row.tokens_per_second for row in same if row.tokens_per_second]
    if not rates:
        return ""
    command = Needle(("a run",), lengths=tuple(NEEDLE[1] // part for part in (8, 4, 2, 1)))
    examples = command.samples * (command.depths + 1)
    return (
        f"{command.samples} examples of each length at {command.depths} depths and without a needle are {examples} x "
        f"{sum(command.lengths):,} tokens, {command.tokens / 1e6:.1f} M for one model. One of {NEEDLE[0][:-1]} M "
        f"parameters with full attention reads them in {command.tokens / (3 * max(rates)):.0f} seconds at three times "
        f"its speed of training on one {same[0].device}. Loading it and layers that are not compiled come on top.\n"
    )


def _cost(path: Path, recipe: Recipe, rate: float) -> tuple[str, ...]:
    minutes = {run.name: planned_work(run.alone(), "cuda") / rate / 60 for run in recipe.runs}
    first = [minutes[run.name] for run in recipe.runs if run.seed == 0]
    shown = (sum(minutes.values()), sum(first), max(minutes.values()))
    return (f"[{path.stem}](../recipes/{path.name})", recipe.question, str(len(minutes)), *(f"{m:.0f}" for m in shown))


def vocabulary(root: Path) -> str:
    """Compare the vocabularies that `openmoba corpus` counted of the training documents."""
    file = root / "results" / "corpus" / "kernel.txt"
    if not file.exists():
        return ""
    row = r"^kernel-train\.parquet +([\d,]+) +([\d,]+) +([\d.]+) +([\d.]+)"
    found = re.findall(row, file.read_text(), re.MULTILINE)
    most = int(found[0][1].replace(",", ""))
    heads = ("vocabulary", "tokens", "bytes a token", "tokens against 4,096", "bits a byte by frequency")
    heads += tuple(f"embeddings of the {name} model" for name in EMBEDDING_WIDTHS)
    cells = []
    for entries, tokens, size, bits in found:
        fewer = int(tokens.replace(",", "")) / most - 1
        tables = [int(entries.replace(",", "")) * width / 1e6 for width in EMBEDDING_WIDTHS.values()]
        cells.append((entries, tokens, size, f"{fewer:+.1%}", bits, *(f"{table:.1f} M" for table in tables)))
    return "\n".join((*markdown_table(heads, cells), ""))
