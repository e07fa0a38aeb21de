"""`model.overrides`: entries of a transformers configuration replaced, those inside a table too, and checked.

transformers only warns of an entry that it does not know, and of some values not even that, and then trains
another model than was asked for. Here each is an error.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openmoba.limits import check_count

Entries = dict[str, Any]

_FEED_FORWARDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What families call the width of their feed-forward."""

MOST_LAYERS = 10_000
"""More would be built for hours before anything could be said about them."""


def transformers_config(family: str, entries: Entries, overrides: Entries) -> Any:
    """Make the configuration of a fresh model of `family`: `entries`, with the overrides on top.

    Args:
        overrides: by name; a dot leads into a table, as in `rope_parameters.rope_theta`.

    Raises:
        ValueError: unknown family, or an override that it does not have or cannot take.
    """
    from transformers import AutoConfig

    try:
        known = AutoConfig.for_model(family)
    except ValueError:
        raise ValueError(f"unknown model.family {family!r}; give a transformers model_type") from None
    entries = _of_family(known, entries)
    with fitting(overrides, f"a {family} model"):
        config = AutoConfig.for_model(family, **entries | _replaced(known, overrides))
        _check(config, overrides)
    return config


def feed_forward_entry(config: Any) -> str | None:
    """Return what a configuration calls the width of its feed-forward; None where it has no such entry."""
    return next((name for name in _FEED_FORWARDS if hasattr(config, name)), None)


def _of_family(known: Any, entries: Entries) -> Entries:
    """Return `entries` under the names that the family gives them."""
    name = feed_forward_entry(known)
    if name is None:
        raise ValueError(
            f"model.family={known.model_type}: its feed-forward has no width that model.size could set; take another"
        )
    own = {"intermediate_size": name}
    return {_own_name(known, own.get(entry, entry)): value for entry, value in entries.items()}


def _own_name(config: Any, name: str) -> str:
    """Return what the family calls an entry: GPT-2 takes `hidden_size` for `n_embd`, and of both the former."""
    own: str = config.attribute_map.get(name, name)
    return own


def replace_entries(config: Any, overrides: Entries, what: str) -> None:
    """Put the overrides into the configuration of a trained model, which errors call `what`.

    Raises:
        ValueError: an override that it does not have or cannot take.
    """
    with fitting(overrides, what):
        for name, value in _replaced(config, overrides).items():
            setattr(config, name, value)
        config.validate()
        _check(config, overrides)


def check_rotation(model: Any, overrides: Entries) -> None:
    """Raise ValueError if heads have no pairs to rotate, or a part of them is to be, and the family rotates all."""
    share = overrides.get("rope_parameters.partial_rotary_factor", 1)
    frequencies = [module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")]
    width = getattr(model.config, "head_dim", None)
    if frequencies and width and width % 2:
        raise ValueError(f"model.overrides: heads of width {width} cannot be rotated by pairs; give an even head_dim")
    if share != 1 and width and any(2 * len(frequency) == width for frequency in frequencies):
        raise ValueError(
            f"model.overrides: a {model.config.model_type} model rotates whole heads and ignores "
            f"rope_parameters.partial_rotary_factor={share}; leave it out, or take a family that has it, such as glm"
        )


def _replaced(config: Any, overrides: Entries) -> Entries:
    """Return the entries of `config` that change, tables as a whole; KeyError for one that it does not have."""
    changed: Entries = {}
    given = {_own_name(config, name): value for name, value in overrides.items()}
    layers = given.get(_own_name(config, "num_hidden_layers"), 1)
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:  # before a configuration lists them
        raise ValueError(f"num_hidden_layers must be 1 to {MOST_LAYERS:,}, got {layers!r}")
    for name, value in overrides.items():
        head, *path = name.split(".")
        if not hasattr(config, head):
            raise KeyError(f"the configuration has no {head}")
        head = _own_name(config, head)
        if not path:
            if head in changed:
                raise KeyError(f"{head} has two names and is set by both")
            changed[head] = value
            continue
        table = changed.setdefault(head, copy.deepcopy(getattr(config, head)))
        for key in path[:-1]:
            table = table.get(key) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise KeyError(f"{name} leads into {'.'.join([head, *path[:-1]])}, which is no table there")
        table[path[-1]] = value
    return changed


_COUNTS = ("hidden_size", "intermediate_size", "head_dim")


def _check(config: Any, overrides: Entries) -> None:
    """Check what transformers leaves to the first forward pass, or computes NaN from."""
    counts = {_own_name(config, name) for name in _COUNTS}
    for name, value in overrides.items():
        theta = name.split(".")[-1] == "rope_theta"
        if theta and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
        if _own_name(config, name) in counts and isinstance(value, int):
            check_count(name, value, 1)
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if heads < 1:
        raise ValueError(f"num_attention_heads must be >= 1, got {heads}")
    if shared is not None and (shared < 1 or heads % shared):
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}")


class _Refuse(logging.Handler):
    """Turns a warning into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError(record.getMessage())


@contextmanager
def fitting(overrides: Entries, what: str) -> Iterator[None]:
    """Make one ValueError of whatever comes of a size or overrides that do not fit `what`; it includes warnings.

    Warnings are those about rotation. Without overrides, missing memory is no fault of the model.
    """
    from huggingface_hub.errors import StrictDataclassError  # what transformers' configurations raise

    logger, refuse = logging.getLogger("transformers.modeling_rope_utils"), _Refuse()
    level = logger.level
    if overrides:
        logger.addHandler(refuse)
        logger.setLevel(logging.WARNING)
    try:
        yield
    except Exception as error:  # models are built of values that nobody has checked
        if not overrides and isinstance(error, MemoryError | RuntimeError):
            raise
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        said = reason.args[0] if reason and reason.args else repr(error)
        fault = f"model.overrides={overrides} do not fit {what}, correct or leave out the entry"
        if not overrides:
            fault = f"model.size does not fit {what}, take another family"
        raise ValueError(f"{fault}: {said}") from error
    finally:
        logger.removeHandler(refuse)
        logger.setLevel(level)
