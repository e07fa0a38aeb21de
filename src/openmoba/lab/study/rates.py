"""Speeds of arms at their fastest micro-batch, from rows of `openmoba bench training` in the folder of a study.

At one window a step a GPU has less to do at once than it could have, and sparse attention loses more by it than full
attention does. How fast an arm is shows at the micro-batch that suits it: these speeds, where they are known for all
runs of a study, take the place of their own.
"""

from __future__ import annotations

import csv
from pathlib import Path

from openmoba.lab.arms import FULL, HYBRID, MOBA, ArmConfig
from openmoba.lab.config import RunConfig

RATES_FILE = "rates.csv"
"""In the folder of a study: what `openmoba bench training --grid study --out FOLDER/rates.csv` wrote."""

Key = tuple[object, ...]
"""Family, size, vocabulary, length, attention and device."""

_COLUMNS = ("family", "size", "vocabulary", "tokens", "block_size", "top_k", "full_layers", "key_conv", "device",
            "kind", "checkpointing", "tokens_per_second")  # fmt: skip


def read_rates(study: Path) -> dict[Key, float]:
    """Read the most tokens per second of each model, attention and device; none without the file.

    Raises:
        ValueError: a column is missing.
    """
    path = study / RATES_FILE
    if not path.exists():
        return {}
    rates: dict[Key, float] = {}
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if missing := [name for name in _COLUMNS if name not in (lines.fieldnames or ())]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; write it with `openmoba bench training --grid study --out "
                f"{path}`, or delete it to have the speeds of the runs themselves"
            )
        for line in lines:
            if line["tokens_per_second"] and (line["kind"], line["checkpointing"]) == ("loop", "False"):
                model = (line["family"], line["size"], int(line["vocabulary"]), int(line["tokens"]))
                key = (*model, _attention(_arm(line)), line["device"])
                rates[key] = max(float(line["tokens_per_second"]), rates.get(key, 0.0))
    return rates


def rate_of(config: RunConfig, gpus: list[str], rates: dict[Key, float]) -> float | None:
    """Find the rate of a run on one GPU; None where there is none, or where the run trains otherwise than they do."""
    model, data, train = config.model, config.data, config.train
    constant = len(config.arm.moba_steps(train.steps)) in (0, train.steps)
    others = [name for name in model.overrides if not name.startswith("rope_parameters")]
    plain = (train.precision, train.compile, train.gradient_checkpointing, train.loss_tokens) == (
        "auto",
        "auto",
        False,
        None,
    )
    if len(gpus) != 1 or others or not constant or not plain:
        return None
    return rates.get((model.family, model.size, data.vocab_size, data.length, _attention(config.arm), gpus[0]))


def _arm(line: dict[str, str]) -> ArmConfig:
    width = int(line["key_conv"]) if line["key_conv"] else None
    if not line["block_size"]:
        return ArmConfig(FULL.name, key_conv=width)
    blocks = (int(line["block_size"]), int(line["top_k"]))
    if not line["full_layers"]:
        return ArmConfig(MOBA.name, *blocks, key_conv=width)
    return ArmConfig(HYBRID.name, *blocks, line["full_layers"], key_conv=width)


def _attention(arm: ArmConfig) -> Key:
    """Return what of an arm decides its speed; of full attention there are no blocks."""
    if arm.kind is FULL:
        return (FULL.name, arm.key_conv)
    return (arm.name, arm.block_size, arm.top_k, arm.full_layers if arm.kind is HYBRID else None, arm.key_conv)
