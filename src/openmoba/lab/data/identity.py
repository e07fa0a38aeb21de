"""What a run was trained on: digests of its documents and its tokenizer, kept with the run.

    train, valid       digests of the training and of the validation documents, in order
    tokenizer          its fingerprint
    vocabulary         its entries
    training_windows   how many windows the training documents make

`data.json` holds them from before the first step on, and `result.json` beside other facts. Whoever goes on with a run,
measures it, or compares it with another, compares these. Runs older than that have the last two alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmoba.lab.config import DataConfig, stored_config
from openmoba.lab.progress import Progress
from openmoba.lab.run_files import IDENTITY_FILE, RESULT_FILE, is_run
from openmoba.records.disk import Row, read_json

if TYPE_CHECKING:
    import numpy as np

Identity = Mapping[str, Any]

ASPECTS = {
    "train": "training documents",
    "valid": "validation documents",
    "tokenizer": "tokenizer",
    "vocabulary": "entries of the tokenizer",
    "training_windows": "training windows",
}
"""Key of an identity -> what it says."""


@dataclass(frozen=True)
class Known:
    """Data that new data must agree with: those of the run `whose`, and what to do if they do not."""

    whose: str
    identity: Identity
    way_out: str

    def check(self, found: Identity, source: str) -> None:
        """Raise ValueError if `found`, read from `source` now, differs in what both know."""
        differing = differences(self.identity, found)
        if differing:
            raise ValueError(
                f"the data of {self.whose} were others: {'; '.join(differing)}. {source} has changed since"
                f"{_LIBRARY if source == 'stdlib' else ''}; {self.way_out}"
            )


OTHER_DOCUMENTS = "restore it as it was, or give others with data.source and data.valid"
"""Way out of whoever starts from a run or measures it."""

_LIBRARY = " (it is the library of the running Python, so it changes with every update)"


def differences(first: Identity, second: Identity) -> list[str]:
    """Say what differs, among what both know: "training documents (1f2e3d4c there, 5b6a7988 here)"."""
    return [
        f"{name} ({_short(first[key])} there, {_short(second[key])} here)"
        for key, name in ASPECTS.items()
        if key in first and key in second and first[key] != second[key]
    ]


def documents_digest(digests: np.ndarray) -> str:
    """Return the digest of documents from the digest of each, uint64 `[documents]`, in order."""
    return hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()


def stored_identity(run: str | Path) -> Identity:
    """Read the identity of the data of the run in the folder `run`; empty if it has none."""
    folder = Path(run)
    if (folder / IDENTITY_FILE).exists():
        return {key: value for key, value in read_json(folder / IDENTITY_FILE).items() if key in ASPECTS}
    return identity_in(read_json(folder / RESULT_FILE)) if (folder / RESULT_FILE).exists() else {}


def identity_in(result: Row) -> Identity:
    """Return the identity of the data that a run's result tells of."""
    return {key: value for key, value in result["data"].items() if key in ASPECTS}


def known_of_run(run: str | Path | None, config: DataConfig, way_out: str, progress: Progress) -> list[Known]:
    """Return what the run in `run` says of data read by `config`: nothing of others, or without a run."""
    if run is None or not is_run(run):
        return []
    identity, settings = stored_identity(run), stored_config(run).data
    _check_split(run, config, settings)
    if shared(dict.fromkeys(ASPECTS), config, settings) and not identity.get("valid"):
        progress.note(
            f"{run} has no {IDENTITY_FILE}: whether {config.source} is still what it was trained on is not known"
        )
    return [Known(str(run), shared(identity, config, settings), way_out)]


def _check_split(run: str | Path, config: DataConfig, settings: DataConfig) -> None:
    """Raise ValueError if `config` holds out others of the documents that the run was trained on by `settings`."""
    same = (config.source, config.column) == (settings.source, settings.column)
    if not same or config.valid is not None or (settings.valid, settings.hold_out) == (None, config.hold_out):
        return
    held = f"data.hold_out={settings.hold_out}" if settings.valid is None else f"data.valid={settings.valid}"
    raise ValueError(
        f"{run} was trained with {held}, so data.hold_out={config.hold_out} would measure it on documents that it was "
        "trained on; give the same, or others with data.valid"
    )


def shared(identity: Identity, config: DataConfig, other: DataConfig, *, same_origin: bool = True) -> Identity:
    """Return the part of `identity`, of data read by the settings `other`, that data read by `config` should have too.

    Documents are shared if the settings name the same ones; the tokenizer, if its settings agree as well and, where it
    is that of a model, `same_origin`; windows, if they have the same length too.
    """
    unlike = {
        field.name for field in dataclasses.fields(config) if getattr(config, field.name) != getattr(other, field.name)
    }
    keys: list[str] = []
    if not unlike - {*_TOKENIZER, *_WINDOWS, "cache"}:
        keys += ["train", "valid"]
        if not unlike & _TOKENIZER and same_origin:
            keys += ["tokenizer", "vocabulary"]
            if not unlike & _WINDOWS:
                keys += ["training_windows"]
    return {key: identity[key] for key in keys if key in identity}


_TOKENIZER = {"tokenizer", "vocab_size"}
_WINDOWS = {"length"}
"""Settings of DataConfig that change nothing but the tokenizer, and nothing but the windows."""


def _short(value: Any) -> str:
    return value[:8] if isinstance(value, str) else str(value)
