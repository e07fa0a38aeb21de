"""A study whose runs are computed, not trained: known laws, noise per run, and documents of known difficulty."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openmoba.lab.config import RunConfig, to_dict
from openmoba.lab.data.identity import Known
from openmoba.lab.progress import Progress
from openmoba.lab.study.recipe import Recipe, parse_recipe
from openmoba.lab.study.work import run_study
from openmoba.lab.train.history import keep

LAWS = {"moba": (1.546, -0.108), "full": (1.464, -0.097), "hybrid": (1.50, -0.103)}
PARAMETERS = {"small": 200_000, "medium": 500_000, "large": 1_200_000}
WINDOWS, DOCUMENTS, RANGES = 24, 8, 8
CUT = 0.05
LUCK = 0.002  # of a seed, as a share of the loss
MORE: dict[tuple[float, int], float] = {}
"""Learning rate and seed -> nats that such a run loses beside the others."""

RECIPE = """
title = "Synthetic study"
[run]
data = { length = 1024 }
arm = { block_size = 64, top_k = 3 }
[sizes]
small = { model = { size = "small" }, train = { steps = 100 } }
medium = { model = { size = "medium" }, train = { steps = 200 } }
large = { model = { size = "large" }, train = { steps = 400 } }
[arms]
full = { name = "full" }
moba = { name = "moba" }
last-1 = { name = "hybrid", full_layers = 1 }
last-2 = { name = "hybrid", full_layers = 2 }
last-3 = { name = "hybrid", full_layers = 3 }
[[stages]]
name = "pretrain"
sizes = ["small", "medium", "large"]
arms = ["full", "moba"]
seeds = [0, 1]
chart = "scaling"
[[stages]]
name = "finetune"
sizes = ["large"]
arms = ["full", "moba", "last-1", "last-2", "last-3"]
seeds = [0, 1]
chart = "layers"
after = "pretrain"
branch = "moba"
run = { train = { steps = 40, loss_tokens = 128 } }
"""

CANDIDATES = """
title = "Short list"
question = "Which setting is as good as full attention?"
[run]
data = { length = 1024 }
arm = { block_size = 64, top_k = 3 }
[sizes]
large = { model = { size = "large" }, train = { steps = 400 } }
[arms]
full = { name = "full" }
moba = { name = "moba" }
fine = { name = "moba", block_size = 16, top_k = 9 }
last-1 = { name = "hybrid", full_layers = 1 }
last-3 = { name = "hybrid", full_layers = 3 }
[[stages]]
name = "candidates"
sizes = ["large"]
arms = ["full", "moba", "fine", "last-1", "last-3"]
seeds = [0]
more_seeds = { full = [1, 2], moba = [1, 2] }
chart = "compare"
"""


def silent(label: str) -> Progress:
    return Progress()


def train(config: RunConfig, folder: Path, *, progress: Progress | None = None, known: Sequence[Known] = ()) -> dict:
    """Stands in for `run_training`: writes a run's records, with losses from the arm's law."""
    size = config.model.size
    arm = f"{config.arm.name}{config.arm.full_layers}"
    rng = np.random.default_rng([config.train.seed, PARAMETERS[size], *arm.encode()])
    luck = np.exp(rng.normal(0, LUCK))
    rows = []
    for step in sorted({*np.linspace(0, config.train.steps, 9)[1:].astype(int), *config.evaluation_steps}):
        rows.append(_evaluation(config, int(step), luck, rng))
        if progress:
            progress.step(int(step), config.train.steps)
    (folder / f"checkpoint-{config.train.steps}").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    keep(folder, rows)
    result = {
        "config": to_dict(config),
        "params": {"total": 2 * PARAMETERS[size], "non_embedding": PARAMETERS[size]},
        "tokens": rows[-1]["tokens"],
        "compute": rows[-1]["compute"],
        "speed": {"tokens_per_second": 50_000.0, "mfu": 0.42, "peak": 1e15},
        "eval": {key: rows[-1][key] for key in ("step", "lm_loss", "trailing_loss")},
        "data": {"training_windows": 1000, "epochs": 1.0, "vocabulary": 2048},
        "hardware": {"cpu": "an imagined processor", "cores": 2, "threads": 2, "gpus": []},
        "versions": {"openmoba": "0", "torch": "2"},
        "commit": "0000000",
        "seconds": 60.0,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return result


def _evaluation(config, step, luck, rng):
    """An evaluation record; the last one keeps every window's losses."""
    parameters = PARAMETERS[config.model.size]
    tokens = step * config.train.batch_size * config.data.length
    compute = 6 * parameters * tokens / 8.64e19
    share = step / config.train.steps
    a, b = LAWS[config.arm.name]
    if config.arm.name == "hybrid":
        full = config.arm.full_layers
        a -= 0.015 * (full if isinstance(full, int) else len(full))
    final = a * (compute / share * 1e6) ** b  # the law holds for the end of a run
    loss = final * luck * (1 + 0.25 * (share**-0.6 - 1))
    shape = 1.35 - 0.35 * (np.arange(RANGES) / (RANGES - 1)) ** 0.4
    more = MORE.get((config.train.learning_rate, config.train.seed), 0.0)
    windows = _difficulty()[:, None] + loss * shape + rng.normal(0, 0.01, (WINDOWS, RANGES)) + more
    means = windows.mean(axis=0)
    return {
        "kind": "eval",
        "step": step,
        "tokens": tokens,
        "lm_loss": float(windows.mean()),
        "trailing_loss": float(means[-1]),
        "position_loss": [{"start": 128 * i, "end": 128 * (i + 1), "loss": float(means[i])} for i in range(RANGES)],
        "compute": {
            "6nd": compute,
            "chinchilla": 1.4 * compute,
            "causal_exact": 1.1 * compute,
            "accelerator_seconds": 60.0 * share,
        },
        **(_windows(windows, config.eval.contexts, config.data.length) if share == 1 else {}),
    }


def _windows(windows, contexts, length):
    """Half of the tokens in sight cost `CUT` nats, a quarter twice that."""
    lm, trailing = windows.mean(axis=1), windows[:, -1]
    cut = np.stack([trailing + CUT * np.log2(length / context) for context in contexts or [length]], axis=1)
    parts = zip(contexts, cut.T, strict=bool(contexts))
    return {
        "context_loss": [
            {"context": c, "loss": part.mean(), "interval": [part.min(), part.max()]} for c, part in parts
        ],
        "intervals": {"lm": [lm.min(), lm.max()], "trailing": [trailing.min(), trailing.max()]},
        "windows": {
            "document": (np.arange(WINDOWS) * DOCUMENTS // WINDOWS).tolist(),
            "lm": lm.round(6).tolist(),
            "trailing": trailing.round(6).tolist(),
            "positions": windows.round(6).tolist(),
            "contexts": cut.round(6).tolist(),
        },
    }


def _difficulty():
    """Of every window, most of it its document's; 0 on average, and the same for all runs."""
    rng = np.random.default_rng(0)
    difficulty = np.repeat(rng.normal(0, 0.3, DOCUMENTS), WINDOWS // DOCUMENTS) + rng.normal(0, 0.1, WINDOWS)
    return difficulty - difficulty.mean()


def make_study(out: Path, text: str = RECIPE) -> Recipe:
    """Finish a study, without a report."""
    recipe = parse_recipe(text, title="t")
    run_study(recipe, out, train, silent)
    return recipe
