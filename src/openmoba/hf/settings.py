"""The MoBA settings of a transformers model: where they are kept, and how they survive saving and loading.

They live in the model's configuration under the key `moba`, as `MobaConfig.to_dict` gives them, and so in
`config.json`. transformers saves no attention implementation, so a program that does not import `openmoba.hf` would run
full attention without a word. Therefore `config.json` also names an `attn_implementation` that nobody registers: it is
honoured on loading and so refused by name, with the way out in it, unless the caller asks for "sdpa" or another one.
Here it is read as "moba".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from transformers import PreTrainedConfig

from openmoba.config import MobaConfig

NAME = "moba"
SAVED_AS = "moba (import openmoba.hf)"


def _get(config: Any) -> dict[str, Any] | None:
    values: dict[str, Any] | None = config.__dict__.get(NAME)
    return values


def _set(config: Any, values: Mapping[str, Any] | MobaConfig | None) -> None:
    """Read settings, as loading and users set them, who may not know of weights that would be left out."""
    if values is not None and not isinstance(values, Mapping | MobaConfig):
        raise ValueError(f"moba must be a table such as {{'block_size': 128, 'top_k': 8}}, got {values!r}")
    settings = MobaConfig.from_dict(dict(values)) if isinstance(values, Mapping) else values
    before = (_get(config) or {}).get("key_conv")
    if before is not None and before != (None if settings is None else settings.key_conv):
        raise ValueError(
            f"this model has a key convolution of width {before}, and moba={values} would leave it out; give "
            f'key_conv={before}, with full_layers="all" for full attention, or load the model as it is and configure it'
        )
    put(config, settings)


def put(config: Any, settings: MobaConfig | None) -> None:
    """Make settings those of a configuration, whose model has been made to agree with them."""
    if settings is None:
        config.__dict__.pop(NAME, None)
        return
    config.__dict__[NAME] = settings.to_dict()
    config._attn_implementation = config._attn_implementation  # which may be "moba" from now on


def saved(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a `config.json` with those that loading needs, if these are MoBA's."""
    return values if values.get(NAME) is None else values | {"attn_implementation": SAVED_AS}


def _set_implementation(config: Any, value: Any) -> None:
    unasked = value is None or value == SAVED_AS
    _implementation.fset(config, NAME if unasked and _get(config) is not None else value)


@wraps(PreTrainedConfig.to_dict)
def _to_dict(config: Any) -> dict[str, Any]:
    return saved(_plain_to_dict(config))


_implementation, _plain_to_dict = PreTrainedConfig._attn_implementation, PreTrainedConfig.to_dict
PreTrainedConfig.moba = property(_get, _set, doc="MoBA settings (`openmoba.MobaConfig` as a dict), or None.")
PreTrainedConfig._attn_implementation = _implementation.setter(_set_implementation)
PreTrainedConfig.to_dict = _to_dict
