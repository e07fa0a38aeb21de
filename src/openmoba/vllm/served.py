"""What is served: a model's MoBA settings as vLLM holds them, and all that cannot be served with them.

Nothing here imports vLLM. Configurations are taken as they come: whatever has the attributes that are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

from openmoba.config import MobaConfig

VERSIONS = ("0.32", "0.33")
"""Releases of vLLM whose interfaces this was written for."""
_PAGES = 32
"""Tokens of which vLLM's kernels for CPUs want a multiple in a page; those for GPUs want one of 16."""


@dataclass(frozen=True)
class Served:
    """The settings of a model that vLLM serves, and the layers that they leave full."""

    block_size: int
    """Tokens per block."""
    top_k: int
    """Blocks that each query reads, its own included."""
    full_layers: frozenset[int]
    """Indices of the layers that vLLM's own attention computes."""
    key_conv: int | None = None
    """Width in tokens of the convolution that the keys of all layers pass; None for none."""

    def is_sparse(self, layer_name: str) -> bool:
        """Tell whether MoBA computes the attention of a layer, named as in `model.layers.3.self_attn.attn`.

        Raises:
            ValueError: the name does not hold exactly one number.
        """
        numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
        if len(numbers) != 1:
            raise ValueError(
                f"the attention layer {layer_name!r} has no one number, so nobody can tell which of the model's "
                "layers it is; MoBA serves decoders whose layers lie in one list"
            )
        return numbers[0] not in self.full_layers

    def __str__(self) -> str:
        full = f", layers {sorted(self.full_layers)} full" if self.full_layers else ""
        keys = "" if self.key_conv is None else f", keys convolved over {self.key_conv} tokens"
        return f"MoBA with blocks of {self.block_size} tokens, top-{self.top_k}{full}{keys}"


def served(config: Any) -> Served | None:
    """Read the settings in the model of a `VllmConfig`; None where the model has none, or there is no model.

    Raises:
        ValueError: they are no MoBA settings, or not of this model.
    """
    text: Any = getattr(getattr(config, "model_config", None), "hf_text_config", None)
    stored = getattr(text, "moba", None)
    if stored is None:
        return None
    settings = MobaConfig.from_dict(stored)
    full_layers = settings.full_layer_indices(text.num_hidden_layers)
    return Served(settings.block_size, settings.top_k, full_layers, settings.key_conv)


def is_known(version: str) -> bool:
    """Tell whether this was written for a release of vLLM."""
    return version.startswith(tuple(f"{known}." for known in VERSIONS))


def check_engine(config: Any, version: str) -> None:
    """Raise ValueError if a model with MoBA settings asks vLLM for what MoBA does not compute.

    Args:
        config: a `VllmConfig`, before the engine starts.
        version: of vLLM.
    """
    if not is_known(version):
        raise ValueError(
            f"MoBA is served by vLLM {' and '.join(VERSIONS)}, this is {version}, whose attention backends may differ; "
            "install one of these"
        )
    for found, way_out in _unserved(config):
        raise ValueError(f"MoBA does not serve {found}; {way_out}")


def _unserved(config: Any) -> list[tuple[str, str]]:
    """Say what of an engine's configuration MoBA does not serve, and the way out of each."""
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    found, dtype = [], str(model.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", dtype):
        found.append((f"a cache in {cache.cache_dtype} of a model in {dtype}", "start with --kv-cache-dtype auto"))
    if config.speculative_config is not None:
        found.append(("speculative decoding", "start without --speculative-config"))
    if config.kv_transfer_config is not None:
        found.append(
            ("a cache that is moved between machines or memories", "start without --kv-transfer-config and offloading")
        )
    if cache.prefix_match_unit is not None:
        found.append(("prefixes that end within a page", "start without --prefix-match-unit"))
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            found.append((f"sequences spread over GPUs ({name})", f"start with {name} of 1, use tensor parallelism"))
    if model.hf_text_config.moba.get("key_conv") is not None:
        if config.lora_config is not None:
            found.append(("key convolution beside LoRA adapters", "start without --enable-lora, merge the adapter"))
        if model.using_transformers_backend():
            found.append(("key convolution in a model of transformers'", "generate with openmoba generate"))
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        found.append((f"layers of types {sorted(kinds)}", "serve a model of full_attention layers"))
    pages, block_size = cache.block_size, model.hf_text_config.moba["block_size"]
    if pages and pages % block_size and block_size % pages:
        found.append(
            (
                f"blocks of {block_size} tokens in pages of {pages}",
                f"start with --block-size {lcm(block_size, _PAGES)}",
            )
        )
    return found


def check_layer(**asked: Any) -> None:
    """Raise ValueError if vLLM asks a layer of a model with MoBA settings for another kind of attention.

    Args:
        asked: the arguments of an implementation of attention, beside its sizes.
    """
    if asked.pop("attn_type", "decoder") != "decoder":
        raise ValueError("MoBA serves text generation, which is causal; start with --runner generate")
    variants = {
        "alibi_slopes": "position biases",
        "sliding_window": "sliding windows",
        "logits_soft_cap": "soft-capped logits",
        "kv_sharing_target_layer_name": "layers that share a cache",
        "sinks": "attention sinks",
    }
    for name, value in asked.items():
        if not (value is None or (isinstance(value, int | float) and value in (0, -1))):  # -1 is no window, 0 no cap
            what = variants.get(name, f"the variant {name}")
            raise ValueError(f"MoBA does not serve {what} ({name}); serve another model")
