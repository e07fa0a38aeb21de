"""The MoBA settings of a transformers model: where they are kept, and how they survive saving and loading.

They live in the model's configuration under the key `moba`, as `MobaConfig.to_dict` gives them, and so in
`config.json`. transformers saves no attention implementation, therefore `moba` is made a property here:
setting it, which loading a `config.json` does too, also selects the attention implementation "moba" unless
another one was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from openmoba.config import MobaConfig

NAME = "moba"


def _get(config: Any) -> dict[str, Any] | None:
    values: dict[str, Any] | None = config.__dict__.get(NAME)
    return values


def _set(config: Any, values: Mapping[str, Any] | MobaConfig | None) -> None:
    if values is None:
        config.__dict__.pop(NAME, None)
        return
    settings = values if isinstance(values, MobaConfig) else MobaConfig.from_dict(dict(values))
    config.__dict__[NAME] = settings.to_dict()
    if config._attn_implementation is None:
        config._attn_implementation = NAME


PreTrainedConfig.moba = property(_get, _set, doc="MoBA settings (`openmoba.MobaConfig` as a dict), or None.")
