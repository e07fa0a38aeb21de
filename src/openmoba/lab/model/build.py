"""Decoders to train: sizes, building from a configuration, starting from a trained one, switching the attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmoba.config import MobaConfig
from openmoba.hub import check_model_source
from openmoba.lab.config import ModelConfig, stored_config
from openmoba.lab.model.checkpoint import checkpoint_step, newest_held
from openmoba.lab.model.overrides import check_rotation, fitting, replace_entries, transformers_config
from openmoba.lab.model.try_out import forward, runs_without_data
from openmoba.lab.progress import Progress
from openmoba.lab.run_files import RESULT_FILE, is_run


@dataclass(frozen=True)
class Size:
    """Widths and depth of a decoder; `kv_heads` None gives every query head keys and values of its own."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    kv_heads: int | None = None

    @property
    def matrices(self) -> int:
        """Parameters of all layers' matrices, which is all parameters but embeddings and norms."""
        keys = (self.kv_heads or self.heads) * self.hidden // self.heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * keys + 3 * self.feed_forward)


SIZES = {
    # For CPUs: heads of 32, for which GPUs have no fast kernels; "base" and above have heads of 64.
    "nano": Size(64, 2, 2, 176),
    "micro": Size(96, 3, 3, 256),
    "tiny": Size(128, 4, 4, 344),
    "mini": Size(192, 6, 6, 512),
    "small": Size(256, 8, 8, 688),
    "base": Size(512, 8, 8, 1376),
    "medium": Size(768, 12, 12, 2048),
    "large": Size(1024, 16, 16, 2736),
    # For GPUs, by their parameters without embeddings. Heads of 64, the feed-forward about 8/3 of the width; 2m, 5m,
    # 9m, 17m and 32m are a ladder in steps of about two, 15m has the twelve layers that many hybrids want.
    "2m": Size(192, 5, 3, 512),
    "5m": Size(256, 6, 4, 704),
    "9m": Size(320, 7, 5, 896),
    "14m": Size(384, 8, 6, 1024),
    "15m": Size(320, 12, 5, 896),
    "17m": Size(384, 10, 6, 960),
    "32m": Size(512, 10, 8, 1408),
    "85m": Size(768, 12, 12, 2048),
    # Heads of 128.
    "32m-d128": Size(512, 10, 4, 1408),
    "85m-d128": Size(768, 12, 6, 2048),
    # Three query heads share the keys and values of one: 14m and 85m with fewer parameters.
    "13m-gqa": Size(384, 8, 6, 1024, kv_heads=2),
    "75m-gqa": Size(768, 12, 12, 2048, kv_heads=4),
    # The scaling-law models of arXiv 2502.13189, table 1. Their feed-forward widths are not published; these give
    # the published counts of parameters.
    "545m": Size(1792, 14, 14, 4864),
    "822m": Size(2048, 16, 16, 5632),
    "1.1b": Size(2304, 18, 18, 5888),
    "1.5b": Size(2560, 20, 20, 6400),
    "2.1b": Size(2816, 22, 22, 7680),
}
"""Presets by name, in increasing order within each group."""


def build_model(config: ModelConfig, vocab_size: int, length: int, seed: int) -> Any:
    """Build a decoder with fresh fp32 weights that depend on the configuration and the seed alone.

    Args:
        vocab_size: `table_size` of the tokenizer; the model's table is rounded up to a multiple of 64.
        length: longest sequence, in tokens.

    Raises:
        ValueError: unknown size or family, or an override that the family's configuration does not have.
    """
    from transformers import AutoModelForCausalLM

    entries = _transformers_config(config, -(-vocab_size // 64) * 64, length)
    with torch.random.fork_rng(), fitting(config.overrides, f"a {config.family} model"):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(entries, dtype=torch.float32)


_SOURCES = "a run's folder, a model's folder, or OWNER/NAME on the hub"
_ANY_VOCABULARY = 1 << 20  # larger than a tokenizer's, before that is known
_LARGE_VOCABULARY = 1 << 17  # as large as most, and fits into memory


def check_model(config: ModelConfig, length: int, attention: MobaConfig | None) -> None:
    """Raise ValueError unless there is such a model with such attention.

    It takes no memory for the weights, unless the model has overrides and its forward pass cannot be judged without.
    """
    with torch.device("meta"):
        model = build_model(config, _ANY_VOCABULARY, length, 0)
    check_rotation(model, config.overrides)
    set_attention(model, attention)
    if config.overrides and not runs_without_data(model):
        _check_forward(build_model(config, _LARGE_VOCABULARY, length, 0), config.overrides, f"a {config.family} model")


def _check_forward(model: Any, overrides: dict[str, Any], what: str) -> None:
    """Raise ValueError if the overrides let the model be built, but not compute."""
    with fitting(overrides, what):
        forward(model)


def load_model(source: str | Path, overrides: dict[str, Any] | None = None) -> Any:
    """Load the model of a folder or a hub name, weights in fp32, entries of its configuration replaced.

    Raises:
        ValueError: there is none, its files are broken, its weights are not safetensors or no numbers, or an
            override does not fit it.
    """
    from transformers import AutoModelForCausalLM

    overrides = overrides or {}
    config = _read_config(source, overrides)
    with _reading(source):
        model = AutoModelForCausalLM.from_pretrained(
            str(source), config=config, dtype=torch.float32, use_safetensors=True
        )
    check_rotation(model, overrides)
    if overrides:
        _check_forward(model, overrides, f"the model of {source}")
    check_finite(model, source)
    return model


def model_like(source: str | Path, overrides: dict[str, Any]) -> Any:
    """Build a model of the configuration in a folder or of a hub name, with weights of its own.

    Raises:
        ValueError: there is none, or an override does not fit it.
    """
    from transformers import AutoModelForCausalLM

    check_model_source(source, _SOURCES)
    return AutoModelForCausalLM.from_config(_read_config(source, overrides), dtype=torch.float32)


def _read_config(source: str | Path, overrides: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    import openmoba.hf  # noqa: F401  registers the attention that a saved model may ask for

    with _reading(source):
        config = AutoConfig.from_pretrained(str(source))
    if overrides:
        replace_entries(config, overrides, f"the model of {source}")
    return config


def check_positions(folder: str | Path, tokens: int, progress: Progress | None = None) -> None:
    """Raise ValueError if sequences of so many tokens do not fit a model's table of positions.

    Models with rotary embeddings have none and compute any position: a note says where they were not made for it.
    """
    config = _read_config(folder, {})
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or tokens <= longest:
        return
    said = f"{tokens:,} tokens are more than the {longest:,} positions of the model of {folder}"
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"{said}, which has no others; give fewer")
    (progress or Progress()).note(f"{said}: it was not made for those behind them")


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the readers of JSON, safetensors and the hub have no common base of errors
        raise ValueError(f"{source} holds no readable model with safetensors weights ({error})") from error


def check_finite(model: Any, source: str | Path) -> None:
    """Raise ValueError if a weight of the model of `source` is NaN or infinite, as after training that diverged."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"{source}: {name} holds NaN or infinity, so the model says nothing; use an earlier checkpoint, or "
                "train it again with a lower learning rate"
            )


@contextmanager
def model_folder(source: str | Path, progress: Progress | None = None) -> Iterator[str | Path]:
    """Yield where a run's model lies: its newest whole checkpoint, held for the body of the `with`.

    Anything that is no run's folder is returned as it is.
    """
    if not is_run(source):
        check_model_source(source, _SOURCES)
        yield source
        return
    with newest_held(Path(source), progress) as checkpoint:
        if checkpoint is None:
            if (Path(source) / RESULT_FILE).exists():
                raise ValueError(f"{source} is a finished run without its checkpoint; train it again in another folder")
            raise ValueError(f"{source} is a run without a whole checkpoint; run `openmoba train {source}` first")
        if progress is not None and (stopped := stopped_at(source, checkpoint)):
            progress.note(f"{source} is not finished: these are the weights of {stopped}")
        yield checkpoint


def stopped_at(source: str | Path, checkpoint: str | Path) -> str | None:
    """Say how far an unfinished run is at a checkpoint, "step 10 of 400"; None if it is finished, or no run."""
    if not is_run(source):
        return None
    step, steps = checkpoint_step(Path(checkpoint)), stored_config(source).train.steps
    return f"step {step:,} of {steps:,}" if step < steps else None


def set_attention(model: Any, attention: MobaConfig | None) -> None:
    """Set MoBA as configured, or full attention for None; at any time, also between two steps of training.

    Raises:
        ValueError: the model has not such attention, or drops some of it in training.
    """
    from openmoba.hf import configure
    from openmoba.hf.model import attend_fully
    from openmoba.hf.support import DROPOUTS

    for name in DROPOUTS:
        if share := getattr(model.config, name, 0):
            raise ValueError(
                f"{name}={share} drops attention weights in training, which neither MoBA nor full attention computes "
                "here; set it to 0 in model.overrides"
            )
    if attention is None:
        attend_fully(model)
    else:
        configure(model, attention)


def _transformers_config(config: ModelConfig, vocab_size: int, length: int) -> Any:
    if config.size not in SIZES:
        raise ValueError(f"unknown model.size {config.size!r}; the sizes are {', '.join(SIZES)}")
    size = SIZES[config.size]
    entries: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads or size.heads,
        "head_dim": size.hidden // size.heads,
        "intermediate_size": size.feed_forward,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        # Those of a family's own vocabulary are words of this one, or behind it; padding would keep an embedding zero.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "use_cache": False,
    }
    return transformers_config(config.family, entries, config.overrides)
