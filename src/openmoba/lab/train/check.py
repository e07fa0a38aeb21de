"""Whether there can be such a run: settings, folder and model, checked before data are read, and then the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmoba.lab.config import RunConfig, changes, stored_config
from openmoba.lab.data.load import Data
from openmoba.lab.data.tokenizer import table_size
from openmoba.lab.model.build import check_model
from openmoba.lab.model.checkpoint import checkpoint_step, checkpoints
from openmoba.lab.run_files import CONFIG_FILE, RECIPE_FILE, has_begun, is_run
from openmoba.lab.train.schedule import check_lengthening


def check_run(config: RunConfig, folder: Path) -> bool:
    """Tell whether a shorter run of this configuration has begun in the folder; reads no data.

    Raises:
        ValueError: there can be no such run, or the folder is not free for it.
    """
    config.check()
    longer = _check_folder(config, folder)
    _check_model(config)
    return longer


def check_start(config: RunConfig, model: Any, source: Path | str) -> None:
    """Raise ValueError unless the model of `source`, from which the run starts, has as many positions as windows do."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.data.length > longest:
        raise ValueError(
            f"data.length={config.data.length} exceeds the {longest} positions of the model of {source}; shorten "
            "it, or extend the model with model.overrides (max_position_embeddings, rope_parameters)"
        )


def check_labels(config: RunConfig, data: Data) -> None:
    """Raise ValueError if `train.loss_tokens` leaves a conversation without labels, whose mean loss would be 0/0."""
    last = config.train.loss_tokens
    if last is None or data.train.store.written is None:
        return
    unlabelled = int((~data.train.labelled(last)).sum())
    if unlabelled:
        raise ValueError(
            f"train.loss_tokens={last}: {unlabelled} of {len(data.train)} training windows have none of the "
            "assistant's tokens there, since conversations are padded at their end; leave train.loss_tokens out"
        )


def check_vocabulary(config: RunConfig, model: Any, data: Data) -> None:
    """Raise ValueError unless the model has an entry for every token."""
    entries = model.get_input_embeddings().weight.shape[0]
    if table_size(data.tokenizer) > entries:
        raise ValueError(
            f"the tokenizer has {table_size(data.tokenizer)} entries, and the model {entries}; leave vocab_size out of "
            "model.overrides, and use the tokenizer of a model that the run starts from, with data.tokenizer=auto"
        )


def _check_folder(config: RunConfig, folder: Path) -> bool:
    """Tell whether a shorter run of this configuration has begun in the folder; ValueError if another one has."""
    if (folder / RECIPE_FILE).exists():
        raise ValueError(f"{folder} is the folder of a study, and a run takes one of its own; use another folder")
    if not has_begun(folder):
        return False
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds records but no {CONFIG_FILE}; restore it or use another folder")
    stored = stored_config(folder)
    if not changes(stored, config):
        return False
    if stored.train.fsdp != config.train.fsdp:
        raise ValueError(
            f"{folder} began with train.fsdp={stored.train.fsdp} and keeps it, on one GPU or several, got "
            f"{config.train.fsdp}; go on as it began, or start another run from it with train.start_from={folder}"
        )
    try:
        newest = checkpoints(folder)
        check_lengthening(stored, config, checkpoint_step(newest[0]) if newest else 0)
    except ValueError as error:
        raise ValueError(f"{folder} holds another run: {error}; use another folder") from error
    return True


def _check_model(config: RunConfig) -> None:
    """Raise ValueError if there is no such model, or the run that this one goes on from has another.

    A run that goes on from another run says the same model, since its records carry that name.
    """
    if config.train.start_from is None:
        check_model(config.model, config.data.length, config.arm.sparsest(config.train.steps))
        return
    start = Path(config.train.start_from)
    if not is_run(start):
        return
    origin = stored_config(start).model
    if (origin.family, origin.size) != (config.model.family, config.model.size):
        raise ValueError(
            f"train.start_from={start} is a run of model.family={origin.family} model.size={origin.size}, this one "
            f"says {config.model.family} {config.model.size}; give the same"
        )
