"""One training run in one folder: started, resumed, or found finished; `openmoba.lab.run_files` has what lies in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from openmoba.lab.config import RunConfig, to_dict
from openmoba.lab.data.identity import OTHER_DOCUMENTS, Known, known_of_run, stored_identity
from openmoba.lab.data.load import load_data, validation_windows
from openmoba.lab.data.tokenizer import table_size
from openmoba.lab.errors import DivergenceError, Terminated, on_sigterm
from openmoba.lab.model.build import build_model, load_model, model_folder, set_attention
from openmoba.lab.model.checkpoint import checkpoint_step, checkpoints, newest_checkpoint, prune
from openmoba.lab.progress import Progress
from openmoba.lab.run_files import CONFIG_FILE, FAILED_FILE, IDENTITY_FILE, RESULT_FILE, has_begun
from openmoba.lab.train.check import check_labels, check_run, check_start, check_vocabulary
from openmoba.lab.train.clock import median_speed
from openmoba.lab.train.history import history, history_until, keep, read_result
from openmoba.lab.train.summary import summary_of
from openmoba.records import disk
from openmoba.records.disk import Row
from openmoba.records.provenance import provenance

if TYPE_CHECKING:
    from openmoba.lab.train.trainer import RunTrainer


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
    if progress is None or not is_first():
        progress = Progress()
    longer = check_run(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_first():
        disk.remove_leftovers(folder)
    if (folder / RESULT_FILE).exists() and not longer:
        progress.note(f"{folder} is finished")
        return read_result(folder)[1]
    checkpoint = newest_checkpoint(folder, progress)
    trainer = _prepare(config, folder, checkpoint, progress, known)
    with on_sigterm(trainer.stop):
        with _begun(trainer):
            _train(trainer, checkpoint)
        result = _finish(trainer)
        if trainer.must_stop(agreeing=True):  # a signal in the last step or since; a study must not begin the next run
            raise Terminated(f"{folder} is finished")
    return result


def _train(trainer: RunTrainer, checkpoint: Path | None) -> None:
    """Train from the checkpoint to the last step; Terminated if a signal stopped it before."""
    folder, steps, note = trainer.folder, trainer.config.train.steps, trainer.progress.note
    if checkpoint is not None:
        note(f"{folder} goes on from step {checkpoint_step(checkpoint)}")
        if checkpoint_step(checkpoint) >= steps:
            return
    note(summary_of(trainer))
    with _way_on(folder):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.stopping and (step := trainer.state.global_step) < steps:
        raise Terminated(f"{folder} stopped at step {step} with a checkpoint; the same command goes on from there")


def _finish(trainer: RunTrainer) -> Row:
    """Write the result of a run that is trained; processes but the first have none."""
    if not trainer.is_world_process_zero():
        return {}
    prune(trainer.folder, keep=1)
    result = _result(trainer)
    disk.write_json(trainer.folder / RESULT_FILE, result)
    return result


@contextmanager
def _way_on(folder: Path) -> Iterator[None]:
    """Add to Ctrl-C, which says nothing itself, where the run goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        kept = checkpoints(folder)
        way = f"goes on from step {checkpoint_step(kept[0])}" if kept else "begins it again"
        raise KeyboardInterrupt(f"{folder} stopped; the same command {way}") from stop


def is_first() -> bool:
    """Tell whether this is the process that speaks and writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _prepare(
    config: RunConfig, folder: Path, checkpoint: Path | None, progress: Progress, known: Sequence[Known]
) -> RunTrainer:
    """Check all settings, read the data, and build the model and what trains it."""
    from openmoba.lab.train.arguments import training_arguments
    from openmoba.lab.train.callback import make_trainer  # transformers.Trainer takes seconds to import

    training_arguments(config, folder)  # refuses before the data are read
    _drop_later(folder, config, checkpoint)
    with _origin(config, progress) as source:
        # Documents that the run it starts from was trained on must not be validation documents of this one.
        origin = known_of_run(config.train.start_from, config.data, OTHER_DOCUMENTS, progress)
        known = [*_begun_with(folder, checkpoint, progress), *origin, *known]
        model = None if source is None else load_model(source, config.model.overrides)
        if source is not None:
            check_start(config, model, source)
            set_attention(model, config.arm.sparsest(config.train.steps))
        data = load_data(config.data, start_from=source, progress=progress, resumed=checkpoint, known=known)
        data = replace(data, valid=validation_windows(data.valid, config.eval.windows))
        check_labels(config, data)
    if model is None:
        model = build_model(config.model, table_size(data.tokenizer), config.data.length, config.train.seed)
        set_attention(model, config.arm.sparsest(config.train.steps))
    check_vocabulary(config, model, data)
    return make_trainer(config, folder, model, data, progress)


@contextmanager
def _origin(config: RunConfig, progress: Progress) -> Iterator[Path | str | None]:
    """Return where the model lies that the run starts from, None for fresh weights."""
    if config.train.start_from is None:
        yield None
        return
    with model_folder(config.train.start_from, progress) as source:
        yield source


@contextmanager
def _begun(trainer: RunTrainer) -> Iterator[None]:
    """Keep settings and data on the disk for the body of the `with`, and after it unless nothing came of it.

    A start that fails before its first record leaves what was there: settings that failed are no defaults of the next.
    But for divergence, which is the outcome of these settings: they stay, with what happened in failed.json.
    """
    config, folder = to_dict(trainer.config), trainer.folder
    files = {folder / CONFIG_FILE: config, folder / IDENTITY_FILE: dict(trainer.data.identity)}
    begun = has_begun(folder)
    before = {path: path.read_bytes() if path.exists() else None for path in (*files, folder / FAILED_FILE)}
    if is_first():
        if begun:  # longer than before, or moved: what its data are is said already
            (folder / RESULT_FILE).unlink(missing_ok=True)
            files.popitem()
        for path, content in files.items():
            disk.write_json(path, content)
        (folder / FAILED_FILE).unlink(missing_ok=True)
    try:
        yield
    except DivergenceError as error:
        if is_first():
            disk.write_json(folder / FAILED_FILE, {"reason": str(error), "config": config})
        raise
    except Exception:
        if is_first() and not begun and not has_begun(folder):
            disk.restore(before)
        raise


def _begun_with(folder: Path, checkpoint: Path | None, progress: Progress) -> list[Known]:
    """Read the data that the run in the folder has begun with, if it has begun and says which."""
    if not has_begun(folder):
        return []
    identity = dict(stored_identity(folder))
    if not identity:
        progress.note(f"{folder} has no {IDENTITY_FILE}: whether its documents are still the same is not known")
    if checkpoint is not None:
        identity.pop("tokenizer", None)  # that of the checkpoint is taken, which need not look the same when read back
    return [Known(str(folder), identity, "restore it as it was, or train in another folder")]


def _drop_later(folder: Path, config: RunConfig, checkpoint: Path | None) -> None:
    """Drop the records after the checkpoint, which are to be made again."""
    kept = history_until(folder, config, 0 if checkpoint is None else checkpoint_step(checkpoint))
    if is_first() and len(kept) < len(history(folder)):
        keep(folder, kept)


def _result(trainer: RunTrainer) -> Row:
    config, folder, data = trainer.config, trainer.folder, trainer.data
    rows = history_until(folder, config, config.train.steps)
    evaluation = next(row for row in reversed(rows) if row["kind"] == "eval")
    trained = [row for row in rows if row["kind"] == "train"]
    # A run older than these records can't say now what it began with.
    identity = stored_identity(folder)
    return {
        "config": to_dict(config),
        "arm": config.arm.name,
        "size": config.size,
        "seed": config.train.seed,
        "params": trainer.shape.parameters,
        "compiled": trainer.compiled,
        "graphed": trainer.graphs.on,
        **({"mesh": trainer.mesh} if trainer.args.world_size > 1 else {}),
        "tokens": config.tokens,
        "compute": evaluation["compute"],
        "eval": {key: evaluation[key] for key in ("step", "lm_loss", "trailing_loss")},
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
