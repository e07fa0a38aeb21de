"""The record of a search for needles, its heat maps, and a page that compares the models.

OUT.jsonl   a line for every model: its scores, and where they come from
OUT.md      a table and sentences, made of it
OUT.png, OUT.svg    heat maps of all models on one scale
"""

# D depths, N lengths, S samples

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from openmoba.lab.arms import KINDS
from openmoba.lab.config import from_dict
from openmoba.lab.measure.needle import Grid, Search
from openmoba.lab.measure.resample import LEVEL, Difference, Floats, paired_difference
from openmoba.records.disk import keep, read, write_text
from openmoba.records.figures import chart_style, save
from openmoba.records.markdown import table
from openmoba.records.provenance import provenance

_RUN = re.compile(r"(?P<size>[^-]+)-(?P<arm>.+)-seed(?P<seed>\d+)")
"""What the folder of a study's run is called."""

EDGE = (
    "At depth 0% the needle is whole, but it is the window's first tokens, with nothing before them. What a model "
    "finds there says how it reads the beginning of a window, not how far back it reaches; all numbers hold it like "
    "every other depth."
)
"""What a reader of the heat maps must know of their first row."""

NOWHERE = "none"
"""Row of a heat map with the examples that lack the needle."""

SUFFIXES = (".md", ".jsonl", ".png", ".svg")
"""What the names of the files end in."""


def write_needles(searches: Sequence[Search], out: Path) -> list[Path]:
    """Write page, record and heat maps of some models of one tokenizer; returns the files in this order."""
    record, origin = out.with_name(f"{out.name}.jsonl"), provenance()
    out.parent.mkdir(parents=True, exist_ok=True)
    keep(record, ({**asdict(search), **origin} for search in searches))
    page, *figures = draw_needles(searches, out)
    return [page, record, *figures]


def draw_needles(searches: Sequence[Search], out: Path) -> list[Path]:
    """Write the page and the heat maps of what was found; returns the files in this order."""
    files = save(needle_chart(searches), out)
    page = out.with_name(f"{out.name}.md")
    write_text(page, "\n".join(_page(searches, files[0].name)) + "\n")
    return [page, *files]


def read_needles(record: Path) -> list[Search]:
    """Read the scores of a record; ValueError if it is damaged."""
    names = [field.name for field in fields(Search)]
    return [from_dict(Search, {name: row.get(name) for name in names}, str(record)) for row in read(record)]


def needle_chart(searches: Sequence[Search]) -> Figure:
    """Draw heat maps of the exact score and of the answer's loss, depth by length, a row of two for each model.

    All models share the colours: of the loss from 0 to that of a guess among all entries.
    """
    names, grids = model_names(searches), searches[0].grids
    depths = [NOWHERE if depth is None else f"{depth:.0%}" for depth in grids[0].depths]
    shown = (
        ("exact", "Answered exactly", "viridis", 1.0, "{:.0%}"),
        ("loss", "Loss of the answer, 0 to chance (nats)", "viridis_r", chance(searches), "{:.2f}"),
    )
    with chart_style():
        height = 1.4 + len(searches) * (0.35 + 0.21 * len(depths))
        figure = Figure(figsize=(max(7.2, 2.2 + 1.4 * len(grids)), height), layout="constrained")
        panels: Any = figure.subplots(len(searches), 2, sharex=True, sharey=True, squeeze=False)
        for column, (score, label, colours, high, form) in enumerate(shown):
            for axes, name, search in zip(panels[:, column], names, searches, strict=True):
                values_DN = np.array([_by_depth(grid, score) for grid in search.grids]).T
                image = axes.imshow(values_DN, cmap=colours, vmin=0.0, vmax=high, aspect="auto")
                axes.grid(visible=False)
                axes.set_title(name if score == "exact" else "", loc="left", fontsize=10)
                for (row, place), value in np.ndenumerate(values_DN):
                    dark = (image.norm(value) < 0.5) == (score == "exact")
                    axes.text(
                        place, row, form.format(value), ha="center", va="center", fontsize=8,
                        color="white" if dark else "black",
                    )  # fmt: skip
                if None in grids[0].depths:
                    axes.axhline(len(depths) - 1.5, color="white", linewidth=3)
            axes.set_xlabel("Length (tokens)")
            axes.set_xticks(range(len(grids)), [f"{grid.length:,}" for grid in grids])
            axes.set_yticks(range(len(depths)), depths)
            look: Any = {"format": PercentFormatter(1.0)} if score == "exact" else {"extend": "max"}
            bar = figure.colorbar(image, ax=panels[:, column], location="top", aspect=30, shrink=0.9, **look)
            bar.set_label(label, fontsize=10)
        figure.supylabel("Depth of the needle in the window (0%: its first tokens)", fontsize=11)
    return figure


def needle_table(searches: Sequence[Search]) -> list[str]:
    """Write a row for every model and length as a Markdown table."""
    reference, names = reference_of(searches), model_names(searches)
    heads = ["model", "length", "answered exactly", "loss of the answer", "without the needle", "the needle brings"]
    heads += [f"from {names[searches.index(reference)]}"] if len(searches) > 1 else []
    rows = []
    for name, search in zip(names, searches, strict=True):
        for number, grid in enumerate(search.grids):
            losses = [f"{loss:.3f}" for loss in _mean_losses(grid)]
            cells = [name, f"{grid.length:,}", _answered(grid), *losses, _signed(brings(grid))]
            if len(searches) > 1:
                same = search is reference
                cells.append("" if same else _signed(beside(grid, reference.grids[number])))
            rows.append(cells)
    return table(heads, rows)


def needle_sentences(searches: Sequence[Search]) -> Iterator[str]:
    """Say of every model at the longest length what the needle brings, and how it stands beside the reference."""
    reference, names = reference_of(searches), model_names(searches)
    known = reference.grids[-1]
    for name, search in zip(names, searches, strict=True):
        grid = search.grids[-1]
        found = brings(grid)
        sentence = (
            f"{name}, {grid.length:,} tokens: {_answered(grid)} answered exactly; the needle changes the loss of the "
            f"answer by {_signed(found)} nats per token, {_verdict(found)}"
        )
        if search is not reference:
            against = beside(grid, known)
            other = names[searches.index(reference)]
            sentence += f"; its loss lies {_signed(against)} from that of {other}, {_verdict(against)}"
        yield f"{sentence} ({_behind(grid)})."


def chance(searches: Sequence[Search]) -> float:
    """Return the loss of a guess among all entries of the vocabulary, nats."""
    return math.log(searches[0].vocabulary)


def reference_of(searches: Sequence[Search]) -> Search:
    """Return the model that the others are compared with: the first with full attention, else the first."""
    return next((search for search in searches if search.full), searches[0])


def model_names(searches: Sequence[Search]) -> list[str]:
    """Return a name for every model, all different, and how far a run is that is not finished.

    The runs of a study have their arm and seed, with the size where it differs; other models the ends of their paths,
    as long as they must be.
    """
    runs = [_RUN.fullmatch(Path(search.source).name) for search in searches]
    found = [_arm_and_seed(run) for run in runs if run]
    if len({run["size"] for run in runs if run}) > 1:
        found = [f"{name}, {run['size']}" for name, run in zip(found, runs, strict=False) if run]
    names = found if len(set(found)) == len(searches) else _ends(searches)
    far = [f" ({search.stopped})" if search.stopped else "" for search in searches]
    return [f"{name}{stopped}" for name, stopped in zip(names, far, strict=True)]


def _arm_and_seed(run: re.Match[str]) -> str:
    kind = KINDS.get(run["arm"])
    return f"{(kind and kind.label) or run['arm']}, seed {run['seed']}"


def _ends(searches: Sequence[Search]) -> list[str]:
    parts = [Path(search.source).parts for search in searches]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [search.source for search in searches]


def brings(grid: Grid) -> Difference:
    """Return the loss with the needle, mean over depths, minus that without it."""
    with_S, without_S = _losses(grid)
    return paired_difference([with_S], [without_S], grid.documents)


def beside(grid: Grid, other: Grid) -> Difference:
    """Return a model's loss with the needle, mean over depths, minus another's."""
    return paired_difference([_losses(grid)[0]], [_losses(other)[0]], grid.documents)


def _page(searches: Sequence[Search], figure: str) -> Iterator[str]:
    first = searches[0].grids[0]
    yield "# Needle in a haystack\n"
    yield (
        "A number is hidden in documents that no model was trained on, and asked for at their end. The loss is that of "
        f"the answer's tokens, in nats; a guess among all {searches[0].vocabulary:,} entries of the vocabulary has "
        f"{chance(searches):.2f}. Without the needle the examples are the same but for it: that loss, the row "
        f"{NOWHERE} of the heat maps, is what a model guesses, and only what lies below it was found. Every length has "
        f"{len(first.documents)} examples at each of {len(first.depths) - 1} depths. Differences are paired, with "
        f"{LEVEL:.0%} intervals over documents; they do not hold the luck of a seed.\n"
    )
    yield f"![Heat maps of exact answers and of the answer's loss, by length and depth of the needle]({figure})\n"
    yield f"{EDGE}\n"
    yield from (f"- {sentence}" for sentence in needle_sentences(searches))
    yield ""
    yield from needle_table(searches)
    yield ""
    seconds = ", ".join(
        f"{name} {search.seconds:.0f}" for name, search in zip(model_names(searches), searches, strict=True)
    )
    yield f"Seconds: {seconds}."


def _answered(grid: Grid) -> str:
    """Count the examples with a needle that were answered exactly."""
    hidden = [scores for depth, scores in zip(grid.depths, grid.exact, strict=True) if depth is not None]
    return f"{np.sum(hidden):.0f} of {np.size(hidden)}"


def _losses(grid: Grid) -> tuple[Floats, Floats]:
    """Return [S] the losses with the needle, mean over depths, and without it."""
    loss_DS = np.asarray(grid.loss)
    hidden_D = np.array([depth is not None for depth in grid.depths])
    return loss_DS[hidden_D].mean(axis=0), loss_DS[~hidden_D].mean(axis=0)


def _mean_losses(grid: Grid) -> tuple[float, float]:
    with_S, without_S = _losses(grid)
    return float(with_S.mean()), float(without_S.mean())


def _by_depth(grid: Grid, score: str) -> Floats:
    """Return [D] the means of a score over examples."""
    values_DS: Floats = np.asarray(getattr(grid, score), dtype=np.float64)
    return np.asarray(values_DS.mean(axis=1))


def _signed(found: Difference) -> str:
    bounds = f" [{found.interval.low:+.3f}, {found.interval.high:+.3f}]" if found.interval else ""
    return f"{found.mean:+.3f}{bounds}"


def _verdict(found: Difference) -> str:
    return "**resolved on these documents**" if found.resolved else "**within noise**"


def _behind(grid: Grid) -> str:
    documents = len(set(grid.documents))
    return f"{documents} document{'s' * (documents != 1)}, {len(grid.documents)} windows, 1 seed"
