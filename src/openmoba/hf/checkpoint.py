"""Turning a checkpoint into a MoBA checkpoint: the same weights, and the settings in `config.json`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from openmoba.config import MobaConfig
from openmoba.hf.key_conv import set_key_conv
from openmoba.hf.settings import NAME, saved
from openmoba.hf.support import check_settings, check_supported
from openmoba.hub import A_MODEL, check_model_source
from openmoba.ops.checks import DTYPES

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_TRAINING_STATE = ("trainer_state.json", "complete.json", "unrecorded.json")
"""Of checkpoints in the middle of training: what transformers' Trainer, and the laboratory, keep beside the model."""


def convert(source: str | Path, out: Path, settings: MobaConfig) -> Path:
    """Write a MoBA checkpoint of the model `source` to the folder `out`.

    The weights are copied as they are, so this is exact; they are looked at one tensor at a time. `out` loads with
    `AutoModelForCausalLM.from_pretrained` once `openmoba.hf` is imported, and with
    `attn_implementation="sdpa"` as the original model. It appears whole or not at all.

    Args:
        source: a folder with `config.json` and safetensors weights, or a model of the hub.
        out: a folder that does not exist yet.
        settings: block size, top-k, and the layers that keep full attention.

    Returns:
        `out`.

    Raises:
        ValueError: no such model, no safetensors weights, weights that are NaN or infinite, attention that MoBA does
            not replace, or `out` exists.
    """
    check_settings(settings)
    if not isinstance(source, str | Path):
        raise ValueError(
            f"source must be a folder or a name on the hub, got a {type(source).__name__}; a model in memory takes "
            "configure(model, settings) and model.save_pretrained(out)"
        )
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder for the converted model")
    folder = _folder(source)
    _check_files(folder)
    config = _config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_supported(model)
    _check_key_conv(config, settings)
    set_key_conv(model, settings.key_conv)
    settings.full_layer_indices(config.num_hidden_layers)
    for path in folder.glob("*.safetensors"):
        _check_weights(path)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in _FILES:
        for path in folder.glob(pattern):
            if path.name in _TRAINING_STATE:
                continue
            shutil.copyfile(path, partial / path.name)
    values = json.loads((folder / "config.json").read_text())
    values = saved(values | {NAME: settings.to_dict()})
    (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return partial.rename(out)


def _check_key_conv(config: Any, settings: MobaConfig) -> None:
    """Raise ValueError if the model's key convolution would stay behind."""
    width = (config.moba or {}).get("key_conv")
    if width not in (None, settings.key_conv):
        raise ValueError(
            f"the model has a key convolution of width {width}, got key_conv={settings.key_conv}; give {width}"
        )


def _check_files(folder: Path) -> None:
    """Raise ValueError unless the folder has what transformers loads: one file, or all that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return
    if not index.exists():
        raise ValueError(f"{folder} has no safetensors weights; save it with save_pretrained first")
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights; restore or download it again") from error
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}, of {len(named)} files of weights; download it again"
        )


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                _check_finite(path, name, weights.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not readable as safetensors ({error}); restore or download it again") from error


def _check_finite(path: Path, name: str, x: Tensor) -> None:
    """Raise ValueError if weights, in a dtype of attention, are no numbers: the model would say nothing else."""
    if x.dtype in DTYPES and x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
        wrong = x.numel() - int(x.isfinite().sum())
        raise ValueError(
            f"{path}: {wrong:,} of {x.numel():,} numbers of {name} are NaN or infinite; restore or download it again"
        )


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # which JSON that is no configuration has many
        raise ValueError(f"{folder} has no config.json that transformers understands ({error})") from error


def _folder(source: str | Path) -> Path:
    """Return the model's folder, downloaded from the hub if it is not one already."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    check_model_source(source, A_MODEL)
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_FILES)))
    except Exception as error:  # those of the hub and of the connection to it have no common base
        raise ValueError(f"{source} is neither a folder nor a model of the hub ({error})") from error
