"""Needle in a haystack: a fact hidden in a real long document, asked for at its end.

    [document ...] The secret number of NAME is 48213. [... document] The secret number of NAME is | 48213
                   `depth` of the way in                                                          answer

An example is scored twice: exactly (the answer that greedy decoding gives, which is right if and only if every token
of it is the likeliest given those before it), and by the mean cross-entropy of the answer's tokens in nats, which also
tells models apart that never answer. The same examples without the needle say what a model guesses: that digits
follow, say. All models, and all depths of a length, have the same documents and numbers.
"""

# D depths, S samples, L tokens of an example, A tokens of its answer

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmoba.lab.arms import FULL
from openmoba.lab.config import DataConfig, stored_config
from openmoba.lab.data.identity import OTHER_DOCUMENTS, known_of_run
from openmoba.lab.data.load import data_of_run, load_validation
from openmoba.lab.data.tokenizer import fingerprint, load_tokenizer
from openmoba.lab.data.windows import Windows
from openmoba.lab.measure.evaluate import autocast
from openmoba.lab.model.build import check_positions, load_model, model_folder, stopped_at
from openmoba.lab.model.checkpoint import checkpoints
from openmoba.lab.progress import Progress
from openmoba.lab.run_files import METRICS_FILE, is_run

_NAMES = ("Arden", "Basel", "Corfu", "Delos", "Evora", "Fargo", "Genoa", "Hilo", "Izmir", "Jena", "Kyoto", "Lyon")
_DOCUMENTS = ("source", "valid", "column", "hold_out")
"""Settings of DataConfig that say which documents were held out."""


@dataclass(frozen=True)
class Grid:
    """The scores of one model at one length.

    Attributes:
        length: tokens of every example.
        depths: [D] where the needle is, 0 at the beginning of the document, 1 at its end; None, the last: nowhere.
        documents: [S] number of the document that an example is from.
        exact: [D][S] whether it was answered exactly.
        loss: [D][S] mean cross-entropy of the answer's tokens, nats.
    """

    length: int
    depths: tuple[float | None, ...]
    documents: tuple[int, ...]
    exact: tuple[tuple[bool, ...], ...]
    loss: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Search:
    """What one model finds.

    Attributes:
        source: a run's folder, a model's folder, or a model of the hub.
        full: whether it is a run with full attention.
        vocabulary: entries of the model's table; a guess among all of them has the loss ln(vocabulary).
        seconds: it took, loading included.
        stopped: of a run that is not finished, where: "step 10 of 400".
    """

    source: str
    full: bool
    vocabulary: int
    grids: tuple[Grid, ...]
    seconds: float
    stopped: str | None = None


def measure_needles(
    sources: Sequence[str | Path],
    *,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    data: DataConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Search]:
    """Measure the grids of some models, each with the attention saved in it.

    Args:
        sources: runs' folders (their newest checkpoints), models' folders, or models of the hub.
        lengths: tokens of the examples.
        depths: how many, evenly from the beginning to the end.
        samples: documents per length; the same ones at every depth.
        data: validation documents; None for those of the runs, the standard library's for models.

    Raises:
        ValueError: no readable model, models of different tokenizers, or too few documents of a length.
    """
    if depths < 1 or samples < 1 or not lengths or not sources:
        given = f"{list(sources)}, {list(lengths)}, {depths} and {samples}"
        raise ValueError(f"needs a model, a length, a depth and a sample, got {given}")
    progress, lengths = progress or Progress(), sorted(set(lengths))
    data = data or data_of_runs(sources) or DataConfig()
    haystacks = _haystacks(sources, lengths, samples, data, progress)
    done, total = 0, len(sources) * len(lengths)
    places = (*np.linspace(0, 1, depths).tolist(), None)
    found: list[Search] = []
    for source in sources:
        start = time.monotonic()
        with model_folder(source) as folder:
            stopped = stopped_at(source, folder)
            tokenizer, model = load_tokenizer(folder), load_model(folder)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        grids = []
        for windows in haystacks:
            scores = _grid(model, tokenizer, windows, places, [seed, windows.length], max(lengths))
            grids.append(Grid(windows.length, places, tuple(windows.documents.tolist()), *scores))
            done += 1
            share = (len(found) * sum(lengths) + sum(grid.length for grid in grids)) / (len(sources) * sum(lengths))
            detail = f"{source}, {windows.length:,} tokens: loss {np.mean(scores[1][:-1]):.2f}"
            progress.step(done, total, detail, share)
        full = is_run(source) and stored_config(source).arm.kind is FULL
        found.append(
            Search(str(source), full, model.config.vocab_size, tuple(grids), time.monotonic() - start, stopped)
        )
    return found


def models_in(source: str, progress: Progress) -> list[str]:
    """Return the runs with checkpoints below the folder of a study, or of many runs; anything else as it is.

    Raises:
        ValueError: a folder of runs, none of which has a checkpoint.
    """
    runs = [] if is_run(source) else sorted(path.parent for path in Path(source).rglob(METRICS_FILE))
    if not runs:
        return [source]
    there = [str(run) for run in runs if checkpoints(run)]
    if not there:
        raise ValueError(
            f"none of the {len(runs)} runs below {source} has a checkpoint here; give a folder with weights"
        )
    if len(there) < len(runs):
        progress.note(f"{len(runs) - len(there)} of {len(runs)} runs below {source} have no checkpoint here: left out")
    return there


def data_of_runs(sources: Sequence[str | Path]) -> DataConfig | None:
    """Return the data settings of the runs among some models; None without a run.

    Raises:
        ValueError: runs that held out different documents, since one may have been trained on those of another.
    """
    found = [(source, data_of_run(source)) for source in sources if is_run(source)]
    if not found:
        return None
    first, documents = found[0]
    for source, data in found[1:]:
        keys = [key for key in _DOCUMENTS if getattr(data, key) != getattr(documents, key)]
        if keys:
            raise ValueError(
                f"{source} and {first} were made of other documents (data.{', data.'.join(keys)}); look for needles in "
                "one of them, then in the other"
            )
    return documents


def hide(tokenizer: Any, document: Tensor, depth: float | None, generator: np.random.Generator) -> tuple[Tensor, int]:
    """Make an example of the document's length, int64 `[L]`; say how many of its last tokens are the answer.

    Args:
        depth: of the needle; None leaves it out.

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
    around = len(document) - len(question) - len(answer)
    room = around - len(needle)
    if room < 1:
        raise ValueError(f"a length of {len(document)} tokens leaves no room for a document; use a longer one")
    if depth is None:
        return torch.cat([document[:around], question, answer]), len(answer)
    place = round(depth * room)
    return torch.cat([document[:place], needle, document[place:room], question, answer]), len(answer)


def _haystacks(
    sources: Sequence[str | Path], lengths: Sequence[int], samples: int, data: DataConfig, progress: Progress
) -> list[Windows]:
    """Pick the documents of every length; every model must be there and read the same tokens."""
    tokens: dict[str, str | Path] = {}
    for source in sources:
        with model_folder(source, progress) as folder:
            check_positions(folder, max(lengths), progress)
            tokens.setdefault(fingerprint(load_tokenizer(folder)), source)
            known = known_of_run(source, data, OTHER_DOCUMENTS, progress)
            if len(tokens) > 1:
                raise ValueError(
                    f"{source} has another tokenizer than {sources[0]}: their losses do not compare; give models of "
                    "one tokenizer, or look for needles in each by itself"
                )
            found = [load_validation(replace(data, length=length), folder, progress, known=known) for length in lengths]
    for windows in found:
        if len(windows) < samples:
            raise ValueError(
                f"the validation documents hold {len(windows)} stretches of {windows.length} tokens, {samples} are "
                "asked for; lower the lengths or the samples, or give longer documents"
            )
    return [windows.spread(samples) for windows in found]


def _grid(
    model: Any, tokenizer: Any, windows: Windows, depths: Sequence[float | None], seed: Sequence[int], together: int
) -> tuple[tuple[tuple[bool, ...], ...], tuple[tuple[float, ...], ...]]:
    """Score all examples of a length, [D][S] each: exactly, and the loss in nats to six digits.

    Args:
        together: tokens of one forward pass, at least an example.
    """
    exact, losses = [], []
    for depth in depths:
        generator = np.random.default_rng(seed)
        examples = [hide(tokenizer, windows[place]["input_ids"], depth, generator) for place in range(len(windows))]
        size = max(1, together // windows.length)
        scores = [score for i in range(0, len(examples), size) for score in _scores(model, examples[i : i + size])]
        exact.append(tuple(right for right, _ in scores))
        losses.append(tuple(float(f"{loss:.6g}") for _, loss in scores))
    return tuple(exact), tuple(losses)


@torch.no_grad()
def _scores(model: Any, examples: Sequence[tuple[Tensor, int]]) -> list[tuple[bool, float]]:
    """Tell of examples of one length whether the answer is exact, and its loss per token in nats."""
    device = model.device
    rows = torch.stack([example for example, _ in examples]).to(device)
    with autocast(device, bf16=device.type == "cuda"):
        out = model(rows, logits_to_keep=max(answer for _, answer in examples) + 1, use_cache=False)
    scores = []
    for logits, (example, answer) in zip(out.logits.float().cpu(), examples, strict=True):
        logit_AV, token_A = logits[-answer - 1 : -1], example[-answer:]
        loss = torch.nn.functional.cross_entropy(logit_AV, token_A)
        scores.append((bool(logit_AV.argmax(-1).equal(token_A)), float(loss)))
    return scores
