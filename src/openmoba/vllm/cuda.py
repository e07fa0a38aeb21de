"""MoBA beside vLLM's FlashAttention, under the name `CUSTOM`, on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from openmoba.vllm.current import current
from openmoba.vllm.layers import MobaLayer

_LARGEST_PAGE = 512  # requests share whole pages, and leave half of one empty


class Layer(MobaLayer, FlashAttentionImpl):  # type: ignore[misc]
    """The attention of one layer; the parent writes the cache, in rows."""

    settings = staticmethod(current)


class Builder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """What a batch is, for all layers."""

    @classmethod
    def get_cudagraph_support(cls, *_: Any) -> AttentionCGSupport:
        """Let vLLM capture whole steps in which each request decodes one token, and others between attentions."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


class Backend(FlashAttentionBackend):  # type: ignore[misc]
    """What vLLM finds under `CUSTOM`."""

    @staticmethod
    def get_name() -> str:
        """Return the name in vLLM's registry."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """Return the class of a layer's attention, by the model that is being made."""
        found: type[Any] = FlashAttentionImpl if current() is None else Layer
        return found

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """Return the class that describes batches."""
        return Builder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Return the tokens of a page where the user names none: those of a block, which is then read from one page."""
        preferred: int = super().get_preferred_block_size(default_block_size)
        settings = current()
        if settings is None or settings.block_size % preferred or settings.block_size > _LARGEST_PAGE:
            return preferred
        return settings.block_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Have a page hold its tokens head by head, as on a CPU: heads choose different blocks to read."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Say that results may depend on the batch, in the last bits."""
        return False
