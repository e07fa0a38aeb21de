"""What the folder of a run holds, and what that says of it.

config.json     the run's configuration, written before the first step
data.json       what it trains on: digests of documents and tokenizer, written with it
metrics.jsonl   records of training and evaluation
checkpoint-*/   weights, tokenizer, and the state to resume from
result.json     the outcome, written last: a run that has one is finished; what it measured is its last evaluation
failed.json     instead of it, why a run diverged, and with which settings

The folder of a study holds the folders of its runs, and recipe.toml.
"""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.json"
IDENTITY_FILE = "data.json"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
FAILED_FILE = "failed.json"
RECIPE_FILE = "recipe.toml"


def is_run(source: str | Path) -> bool:
    """Tell whether `source` is the folder of a run, not that of a model or a hub name."""
    return str(source) != "" and (Path(source) / METRICS_FILE).exists()


def has_begun(folder: Path) -> bool:
    """Tell whether the run in `folder` left a record or a checkpoint."""
    return is_run(folder) or any(folder.glob("checkpoint-*"))
