"""Speeds of arms at their fastest micro-batch, from rows of `openmoba bench training` in the folder of a study.

At one window a step a GPU has less to do at once than it could have, and sparse attention loses more by it than full
attention does. How fast an arm is shows at the micro-batch that suits it: these speeds, where they are known for all
runs of a study, take the place of their own.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from openmoba.lab.arms import FULL, HYBRID, ArmConfig
from openmoba.lab.config import RunConfig
from openmoba.records.disk import whole_lines

RATES_FILE = "rates.csv"
"""In the folder of a study: what `openmoba bench training --grid study --out FOLDER/rates.csv` wrote."""

Key = tuple[object, ...]
"""Family, size, vocabulary, length, attention and device."""

_COLUMNS = ("family", "size", "vocabulary", "tokens", "block_size", "top_k", "full_layers", "key_conv", "device",
            "kind", "checkpointing", "tokens_per_second")  # fmt: skip


def read_rates(study: Path) -> dict[Key, float]:
    """Read the most tokens per second of each model, attention and device; none without the file.

    Raises:
        ValueError: a column is missing, or a row is none of `openmoba bench training`. A torn last one is left out.
    """
    path = study / RATES_FILE
    lines = csv.DictReader(io.StringIO(whole_lines(path).decode()))
    names = lines.fieldnames or _COLUMNS
    way_out = (
        f"write it with `openmoba bench training --grid study --out {path}`, or delete it to have the speeds of the "
        "runs themselves"
    )
    if missing := [name for name in _COLUMNS if name not in names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; {way_out}")
    rates: dict[Key, float] = {}
    for line in lines:
        if line["tokens_per_second"] and (line["kind"], line["checkpointing"]) == ("loop", "False"):
            try:
                key, rate = _key(line), float(line["tokens_per_second"])
            except ValueError as error:
                raise ValueError(f"{path} has a row that no run can be ({error}); {way_out}") from error
            rates[key] = max(rate, rates.get(key, 0.0))
    return rates


def rate_of(config: RunConfig, gpus: list[str], rates: dict[Key, float]) -> float | None:
    """Find the rate of a run on one GPU; None where there is none, or where the run trains otherwise than they do."""
    model, data, train = config.model, config.data, config.train
    constant = len(config.arm.moba_steps(train.steps)) in (0, train.steps)
    others = [name for name in model.overrides if not name.startswith("rope_parameters")]
    plain = train.precision == train.compile == "auto" and train.loss_tokens is None
    plain = plain and not train.gradient_checkpointing
    if len(gpus) != 1 or others or not constant or not plain:
        return None
    return rates.get((model.family, model.size, data.vocab_size, data.length, _attention(config.arm), gpus[0]))


def _key(line: dict[str, str]) -> Key:
    """Read what a row is of; ValueError for a cell that is no number where one belongs."""
    block_size, top_k, key_conv = (
        int(line[name]) if line[name] else None for name in ("block_size", "top_k", "key_conv")
    )
    arm = ArmConfig.of(block_size, top_k, line["full_layers"] or None, key_conv)
    return (line["family"], line["size"], int(line["vocabulary"]), int(line["tokens"]), _attention(arm), line["device"])


def _attention(arm: ArmConfig) -> Key:
    """Return what of an arm decides its speed; of full attention there are no blocks."""
    if arm.kind is FULL:
        return (FULL.name, arm.key_conv)
    return (arm.name, arm.block_size, arm.top_k, arm.full_layers if arm.kind is HYBRID else None, arm.key_conv)
