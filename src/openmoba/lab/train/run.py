"""One training run in one folder: started, resumed, or found finished.

config.json     the run's configuration, written before the first step
data.json       what it trains on: digests of documents and tokenizer, written with it
metrics.jsonl   records of training and evaluation
checkpoint-*/   weights, tokenizer, and the state to resume from
result.json     the outcome, written last: a run that has one is finished
failed.json     instead of it, why a run diverged, and with which settings
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openmoba.lab.config import RunConfig, changes, is_run, stored_config, to_dict
from openmoba.lab.data.identity import IDENTITY_FILE, OTHER_DOCUMENTS, Known, known_of_run, stored_identity
from openmoba.lab.data.load import Data, load_data, validation_windows
from openmoba.lab.errors import DivergenceError, Terminated, on_sigterm
from openmoba.lab.model.build import build_model, check_model, load_model, model_folder, set_attention
from openmoba.lab.model.checkpoint import checkpoint_step, checkpoints, newest_checkpoint, prune
from openmoba.lab.progress import Progress
from openmoba.lab.train.clock import median_speed
from openmoba.lab.train.history import FAILED_FILE, METRICS_FILE, RESULT_FILE, history, history_until, read_result
from openmoba.lab.train.schedule import check_lengthening
from openmoba.lab.train.summary import summary_of
from openmoba.records import disk
from openmoba.records.provenance import provenance

Row = dict[str, Any]


def run_training(
    config: RunConfig, folder: Path, *, progress: Progress | None = None, known: Sequence[Known] = ()
) -> Row:
    """Bring the run in `folder` to its end and return its result.

    A finished run is not trained again. A killed one goes on from its newest whole checkpoint, with the same
    records as if it had never stopped: what was recorded after that checkpoint is dropped and made again.

    Args:
        known: data that the run's must agree with, beside those that it began with and those of the run it starts from.

    Raises:
        ValueError: bad configuration or data, a folder of another run, data that have changed, a loss that is not a
            number, a damaged checkpoint, a full disk.
    """
    if progress is None or not _is_first():
        progress = Progress()
    longer = check_run(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_first():
        disk.remove_leftovers(folder)
    if (folder / RESULT_FILE).exists() and not longer:
        progress.note(f"{folder} is finished")
        return read_result(folder)[1]
    checkpoint = newest_checkpoint(folder, progress)
    trainer, data = _prepare(config, folder, checkpoint, progress, known)
    with _begun(config, data, folder):
        if checkpoint is not None:
            progress.note(f"{folder} goes on from step {checkpoint_step(checkpoint)}")
        if checkpoint is None or checkpoint_step(checkpoint) < config.train.steps:
            progress.note(summary_of(config, folder, trainer, data))
            with on_sigterm(trainer.stop):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.stopping and trainer.state.global_step < config.train.steps:
        step = trainer.state.global_step
        raise Terminated(f"{folder} stopped at step {step} with a checkpoint; the same command goes on from there")
    if not trainer.is_world_process_zero():
        return {}
    prune(folder, keep=1)
    result = _result(config, folder, trainer, data)
    disk.write_json(folder / RESULT_FILE, result)
    if trainer.stopping:  # in the last step; a study must not begin the next run
        raise Terminated(f"{folder} is finished")
    return result


def check_run(config: RunConfig, folder: Path) -> bool:
    """Tell whether a shorter run of this configuration has begun in the folder; reads no data.

    Raises:
        ValueError: there can be no such run, or the folder is not free for it.
    """
    config.check()
    longer = _check_folder(config, folder)
    _check_model(config)
    return longer


def _is_first() -> bool:
    """Tell whether this is the process that speaks and writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _prepare(
    config: RunConfig, folder: Path, checkpoint: Path | None, progress: Progress, known: Sequence[Known]
) -> tuple[Any, Data]:
    """Check all settings, read the data, and build the model and what trains it."""
    # transformers.Trainer takes seconds to import
    from openmoba.lab.train.arguments import training_arguments
    from openmoba.lab.train.trainer import RunTrainer

    training_arguments(config, folder)  # refuses before the data are read
    rows = _history(folder, config, checkpoint)
    with _origin(config, progress) as source:
        # Documents that the run it starts from was trained on must not be validation documents of this one.
        origin = known_of_run(config.train.start_from, config.data, OTHER_DOCUMENTS, progress)
        known = [*_begun_with(folder, checkpoint, progress), *origin, *known]
        model = None if source is None else _start(config, source)
        data = load_data(config.data, start_from=source, progress=progress, resumed=checkpoint, known=known)
        valid = validation_windows(data.valid, config.eval.windows)
        _check_labels(config, data)
    if model is None:
        model = build_model(config.model, len(data.tokenizer), config.data.length, config.train.seed)
        set_attention(model, config.arm.sparsest(config.train.steps))
    _check_vocabulary(config, model, data)
    trained = [row for row in rows if row["kind"] == "train"]
    spent = (trained[-1]["seconds"], trained[-1]["compute"]["accelerator_seconds"]) if trained else (0.0, 0.0)
    return RunTrainer(config, folder, model, data.train, valid, data.tokenizer, progress, spent), data


@contextmanager
def _origin(config: RunConfig, progress: Progress) -> Iterator[Path | str | None]:
    """Return where the model lies that the run starts from, None for fresh weights."""
    if config.train.start_from is None:
        yield None
        return
    with model_folder(config.train.start_from, progress) as source:
        yield source


@contextmanager
def _begun(config: RunConfig, data: Data, folder: Path) -> Iterator[None]:
    """Keep settings and data on the disk for the body of the `with`, and after it unless nothing came of it.

    A start that fails before its first record leaves what was there: settings that failed are no defaults of the next.
    But for divergence, which is the outcome of these settings: they stay, with what happened in failed.json.
    """
    files = {folder / "config.json": to_dict(config), folder / IDENTITY_FILE: dict(data.identity)}
    begun = disk.has_begun(folder)
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    if _is_first():
        if begun:  # longer than before, or moved: what its data are is said already
            (folder / RESULT_FILE).unlink(missing_ok=True)
            files.popitem()
        for path, content in files.items():
            disk.write_json(path, content)
        (folder / FAILED_FILE).unlink(missing_ok=True)
    try:
        yield
    except DivergenceError as error:
        if _is_first():
            disk.write_json(folder / FAILED_FILE, {"reason": str(error), "config": to_dict(config)})
        raise
    except Exception:
        if _is_first() and not begun and not disk.has_begun(folder):
            disk.restore(before)
        raise


def _check_folder(config: RunConfig, folder: Path) -> bool:
    """Tell whether a shorter run of this configuration has begun in the folder; ValueError if another one has."""
    if not disk.has_begun(folder):
        return False
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds records but no config.json; restore it or use another folder")
    stored = stored_config(folder)
    if not changes(stored, config):
        return False
    try:
        newest = checkpoints(folder)
        check_lengthening(stored, config, checkpoint_step(newest[0]) if newest else 0)
    except ValueError as error:
        raise ValueError(f"{folder} holds another run: {error}; use another folder") from error
    return True


def _begun_with(folder: Path, checkpoint: Path | None, progress: Progress) -> list[Known]:
    """Read the data that the run in the folder has begun with, if it has begun and says which."""
    if not disk.has_begun(folder):
        return []
    identity = dict(stored_identity(folder))
    if not identity:
        progress.note(f"{folder} has no {IDENTITY_FILE}: whether its documents are still the same is not known")
    if checkpoint is not None:
        identity.pop("tokenizer", None)  # that of the checkpoint is taken, which need not look the same when read back
    return [Known(str(folder), identity, "restore it as it was, or train in another folder")]


def _check_labels(config: RunConfig, data: Data) -> None:
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


def _start(config: RunConfig, source: Path | str) -> Any:
    """Load the model of `source`, which has the positions and the layers that are asked for."""
    model = load_model(source, config.model.overrides)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.data.length > longest:
        raise ValueError(
            f"data.length={config.data.length} exceeds the {longest} positions of the model of {source}; shorten "
            "it, or extend the model with model.overrides (max_position_embeddings, rope_parameters)"
        )
    set_attention(model, config.arm.sparsest(config.train.steps))
    return model


def _check_vocabulary(config: RunConfig, model: Any, data: Data) -> None:
    entries = model.get_input_embeddings().weight.shape[0]
    if len(data.tokenizer) > entries:
        raise ValueError(
            f"the tokenizer has {len(data.tokenizer)} entries, the model of {config.train.start_from} has {entries}; "
            "use its own with data.tokenizer=auto"
        )


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


def _history(folder: Path, config: RunConfig, checkpoint: Path | None) -> list[Row]:
    """Read the records up to the checkpoint; those after it are dropped, since they will be made again."""
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    kept = history_until(folder, config, step)
    if _is_first() and len(kept) < len(history(folder)):
        disk.keep(folder / METRICS_FILE, kept)
    return kept


def _result(config: RunConfig, folder: Path, trainer: Any, data: Data) -> Row:
    rows = history_until(folder, config, config.train.steps)
    evaluation = next(row for row in reversed(rows) if row["kind"] == "eval")
    trained = [row for row in rows if row["kind"] == "train"]
    start = config.train.start_from
    # A run older than these records can't say now what it began with.
    identity = stored_identity(folder)
    return {
        "config": to_dict(config),
        "arm": config.arm.name,
        "size": config.model.size if start is None or is_run(start) else Path(start).name,
        "seed": config.train.seed,
        "params": trainer.shape.parameters,
        "compiled": trainer.compiled,
        **({"mesh": trainer.mesh} if trainer.args.world_size > 1 else {}),
        "tokens": config.tokens,
        "compute": evaluation["compute"],
        "eval": {key: value for key, value in evaluation.items() if key != "windows"},
        "data": {
            "training_windows": len(data.train),
            "epochs": config.train.steps * config.train.batch_size / len(data.train),
            "vocabulary": len(data.tokenizer),
            **identity,
        },
        "speed": median_speed(trained, trainer.speedometer.peak),
        "seconds": trained[-1]["seconds"],
        **provenance(),
    }
