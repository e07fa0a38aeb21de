"""Needle in a haystack: a fact hidden in a real long document, asked for at its end.

    [document ...] The secret number of NAME is 48213. [... document] The secret number of NAME is | 48213
                   `depth` of the way in                                                          answer

Each cell of the length-by-depth grid is scored twice over several documents: exactly (the answer that greedy
decoding gives, which is right if and only if every token of it is the likeliest given those before it), and by the
mean cross-entropy of the answer's tokens in nats, which also tells models apart that never answer.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from openmoba.lab.config import DataConfig, is_run
from openmoba.lab.data.identity import OTHER_DOCUMENTS, Known, known_of_run
from openmoba.lab.data.load import data_of_run, load_validation
from openmoba.lab.data.tokenizer import load_tokenizer
from openmoba.lab.measure.evaluate import autocast
from openmoba.lab.model.build import load_model, model_folder
from openmoba.lab.progress import Progress
from openmoba.records.disk import write_text
from openmoba.records.figures import save

_NAMES = ("Arden", "Basel", "Corfu", "Delos", "Evora", "Fargo", "Genoa", "Hilo", "Izmir", "Jena", "Kyoto", "Lyon")

# L tokens of the document, N tokens of the needle, A tokens of the answer


@dataclass(frozen=True)
class Cell:
    """Score of one length and depth.

    Attributes:
        length: tokens of the whole example.
        depth: where the needle is, 0 at the beginning of the document, 1 at its end.
        samples: examples.
        exact: share of them answered exactly.
        loss: mean cross-entropy of the answers' tokens, nats.
        chance: that of a guess among all tokens, the logarithm of the vocabulary's size.
    """

    length: int
    depth: float
    samples: int
    exact: float
    loss: float
    chance: float


def measure_needle(
    source: str | Path,
    *,
    lengths: tuple[int, ...],
    depths: int,
    samples: int,
    data: DataConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Cell]:
    """Measure the grid of a model, with the attention saved in it.

    Args:
        source: a run's folder (its newest checkpoint), a model's folder, or a model of the hub.
        lengths: tokens of the examples.
        depths: how many, evenly from the beginning to the end.
        samples: documents per cell; the same ones at every depth.
        data: validation documents; None for those of the run, the standard library's for a model.

    Raises:
        ValueError: no readable model, or too few documents of a length.
    """
    if depths < 1 or samples < 1 or not lengths:
        raise ValueError(f"needs a length, a depth and a sample, got {lengths}, {depths} and {samples}")
    progress = progress or Progress()
    if data is None:
        data = data_of_run(source) if is_run(source) else DataConfig()
    known = known_of_run(source, data, OTHER_DOCUMENTS, progress)
    with model_folder(source, progress) as folder:
        tokenizer, model = load_tokenizer(folder), load_model(folder)
        haystacks = {
            length: _documents(replace(data, length=length), folder, samples, progress, known) for length in lengths
        }
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    chance = float(np.log(model.config.vocab_size))
    cells = []
    grid = [(length, float(depth)) for length in lengths for depth in np.linspace(0, 1, depths)]
    for done, (length, depth) in enumerate(grid, start=1):
        generator = np.random.default_rng([seed, length])
        scores = [_score(model, *hide(tokenizer, hay, depth, generator)) for hay in haystacks[length]]
        exact, loss = np.mean(np.asarray(scores), axis=0)
        cells.append(Cell(length, depth, samples, float(exact), float(loss), chance))
        progress.step(done, len(grid), f"{length} tokens, depth {depth:.0%}: loss {loss:.2f}")
    return cells


def hide(tokenizer: Any, document: Tensor, depth: float, generator: np.random.Generator) -> tuple[Tensor, int]:
    """Make an example of the document's length, int64 `[L]`; say how many of its last tokens are the answer.

    Raises:
        ValueError: the document is not longer than the question.
    """
    name, number = _NAMES[generator.integers(len(_NAMES))], int(generator.integers(10_000, 100_000))
    needle, question, answer = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (
            f"\nThe secret number of {name} is {number}.\n",
            f"\nThe secret number of {name} is",
            f" {number}",
        )
    )
    room = len(document) - len(needle) - len(question) - len(answer)
    if room < 1:
        raise ValueError(f"a length of {len(document)} tokens leaves no room for a document; use a longer one")
    place = round(depth * room)
    parts = [document[:place], needle, document[place:room], question, answer]
    return torch.cat(parts), len(answer)


def needle_chart(cells: list[Cell], *, title: str) -> Figure:
    """Draw heat maps of the exact score and of the answer's loss, depth by length.

    The loss is coloured from 0 to chance, so that the charts of models with one vocabulary compare.
    """
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(title)
    panels: Any = figure.subplots(1, 2)
    shown = (
        ("exact", "Answered exactly", "viridis", 0.0, 1.0, "{:.0%}"),
        ("loss", "Loss of the answer (nats per token), to chance", "viridis_r", 0.0, cells[0].chance, "{:.2f}"),
    )
    for axes, (name, label, colours, low, high, form) in zip(panels, shown, strict=True):
        values = {(cell.depth, cell.length): getattr(cell, name) for cell in cells}
        grid_DL = np.array([[values[depth, length] for length in lengths] for depth in depths])
        image = axes.imshow(grid_DL, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axes.set(xlabel="Length (tokens)", ylabel="Depth of the needle")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for (row, column), value in np.ndenumerate(grid_DL):
            dark = image.norm(value) < 0.5 if name == "exact" else image.norm(value) > 0.5
            colour = "white" if dark else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=9)
        figure.colorbar(image, ax=axes, label=label, extend="neither" if name == "exact" else "max")
    return figure


def write_needle(cells: list[Cell], out: Path, *, title: str) -> list[Path]:
    """Write the grid as `out`.csv, and its chart as .png and .svg."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["length", "depth", "samples", "exact", "loss", "chance"])
    writer.writerows(
        [c.length, f"{c.depth:.4f}", c.samples, f"{c.exact:.4f}", f"{c.loss:.6f}", f"{c.chance:.6f}"] for c in cells
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    table = out.with_name(f"{out.name}.csv")
    write_text(table, text.getvalue())
    return [table, *save(needle_chart(cells, title=title), out)]


def _documents(
    data: DataConfig, folder: str | Path, samples: int, progress: Progress, known: list[Known]
) -> list[Tensor]:
    """Pick `samples` different stretches of `data.length` tokens, each from inside one document."""
    windows = load_validation(data, folder, progress, known=known)
    if len(windows) < samples:
        raise ValueError(
            f"the validation documents hold {len(windows)} stretches of {data.length} tokens, {samples} are asked for; "
            "lower the lengths or the samples, or give longer documents"
        )
    return [window["input_ids"] for window in (windows.spread(samples)[i] for i in range(samples))]


@torch.no_grad()
def _score(model: Any, example: Tensor, answer: int) -> tuple[bool, float]:
    """Tell whether the answer is exact, and its loss per token in nats."""
    device = model.device
    with autocast(device, bf16=device.type == "cuda"):
        out = model(example[None].to(device), logits_to_keep=answer + 1, use_cache=False)
    logit_AV, token_A = out.logits[0, :-1].float().cpu(), example[-answer:]
    loss = torch.nn.functional.cross_entropy(logit_AV, token_A)
    return bool(logit_AV.argmax(-1).equal(token_A)), float(loss)
