"""What MoBA does not serve is refused in a sentence before the engine starts, by a real configuration of vLLM.

The backend for GPUs, which cannot run here, is made and asked as vLLM makes and asks its own.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import save_moba
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

from openmoba import MobaConfig
from openmoba.vllm import cpu, cuda

SETTINGS = MobaConfig(block_size=16, top_k=3, full_layers=(1,))


def configure(folder: Path, **options: Any) -> Any:
    return EngineArgs(model=str(folder), dtype="float32", max_model_len=1024, **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "does not serve a cache in fp8 of a model in float32"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
            "does not serve speculative decoding",
        ),
        ({"kv_offloading_size": 1.0}, "does not serve a cache that is moved"),
        ({"block_size": 40}, "does not serve blocks of 16 tokens in pages of 40"),
        ({"attention_backend": "FLASH_ATTN"}, "other attention backends do not compute; start with CPU_ATTN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(options: dict[str, Any], message: str, full: Path) -> None:
    configure(full, **options)
    with pytest.raises(ValueError, match=message):
        configure(save_moba(full, SETTINGS), **options)


def test_pages_that_the_error_names(full: Path) -> None:
    folder = save_moba(full, MobaConfig(block_size=100, top_k=3))
    with pytest.raises(ValueError, match=r"blocks of 100 tokens in pages of 128; start with --block-size 800$"):
        configure(folder)
    assert configure(folder, block_size=800).cache_config.block_size == 800


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sliding_window": 64}, r"sliding windows \(sliding_window\)"),
        ({"alibi_slopes": [0.5] * 4}, "position biases"),
        ({"logits_soft_cap": 30.0}, "soft-capped logits"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "causal; start with --runner generate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_kinds_of_attention(asked: dict[str, Any], message: str, full: Path) -> None:
    """As vLLM's models ask for them, layer by layer."""
    with set_current_vllm_config(configure(save_moba(full, SETTINGS))):
        made = AttentionBackendEnum.CPU_ATTN.get_class().get_impl_cls()
        assert made is cpu.Layer
        made(4, 32, 1.0, 2)
        with pytest.raises(ValueError, match=message):
            made(4, 32, 1.0, 2, **asked)


def test_the_layer_for_gpus_is_made_like_its_parent(full: Path) -> None:
    """FlashAttention cannot run here; what is overridden has the parameters that vLLM passes."""
    assert AttentionBackendEnum.CUSTOM.get_class() is cuda.Backend
    for name, more in (("__init__", ["sinks"]), ("forward", ["output_scale", "output_block_scale"])):
        theirs, ours = (
            list(inspect.signature(getattr(of, name)).parameters) for of in (FlashAttentionImpl, cuda.Layer)
        )
        assert theirs == [parameter for parameter in ours if parameter in theirs] + more
    with set_current_vllm_config(configure(save_moba(full, SETTINGS))):
        assert cuda.Backend.get_impl_cls() is cuda.Layer
    assert cuda.Backend.get_impl_cls() is FlashAttentionImpl


class LayerOnGpus(AttentionLayerBase):
    """What vLLM asks for its backend where that is ours for GPUs."""

    def get_attn_backend(self) -> Any:
        return cuda.Backend

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None


@pytest.mark.parametrize(("block_size", "page"), [(64, 64), (512, 512), (1024, 16), (8, 16), (None, 16)])
def test_a_page_is_a_block_on_gpus(block_size: int | None, page: int, full: Path) -> None:
    """Where the user names none, the block is a multiple of vLLM's 16 tokens, and not too large to be shared whole."""
    folder = full if block_size is None else save_moba(full, MobaConfig(block_size=block_size, top_k=3))
    for named, expected in ({}, page), ({"block_size": 32}, 32):
        config = configure(folder, **named)
        config.compilation_config.static_forward_context["model.layers.0.self_attn.attn"] = LayerOnGpus()
        Platform.update_block_size_for_backend(config)
        assert config.cache_config.block_size == expected


def test_pages_on_gpus_lie_as_on_a_cpu() -> None:
    """Where vLLM's own backend would have them otherwise; tests on a card and figures are of pages like these."""
    ours, theirs = (get_supported_kv_cache_layouts([backend]) for backend in (cuda.Backend, FlashAttentionBackend))
    assert ours == get_supported_kv_cache_layouts([cpu.Backend])
    assert theirs[0] != ours[0] in theirs
