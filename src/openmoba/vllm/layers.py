"""The attention of one layer over vLLM's paged cache: MoBA, or what vLLM computes, layer by layer.

vLLM hands over a packed batch: the new tokens of all requests, where each request's begin, how long each is by now,
and which pages of the cache it lies in. That is what `openmoba.moba_paged` takes. A page may be shared by requests
that begin alike. So may its centroids, which lie in a tensor of the same order as the pages; vLLM need not know of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from openmoba.ops.paged import complete_paged, moba_paged, new_paged_centroids
from openmoba.vllm.served import Served, check_layer

# Z pages of the cache, Hkv key heads, P tokens of a page, D head width, N new tokens, H query heads


class MobaLayer:
    """What an implementation of attention in vLLM becomes when a model has MoBA settings; put before its class."""

    served: Served
    """The model's settings."""
    scale: float
    """Of the logits, as vLLM sets it."""
    centroids: Tensor | None = None
    """`[Z, ...]` as `openmoba.new_paged_centroids` makes them, once there is a cache."""
    key_conv: Any = None
    """An `openmoba.vllm.key_conv.KeyConvolution`, which a model that asks for one has given."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        """Make the layer; the arguments are vLLM's.

        Raises:
            ValueError: this is not attention that MoBA computes.
        """
        asked = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": attn_type,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **more,
        }
        check_layer(**asked)
        parent: Any = super()
        parent.__init__(num_heads, head_size, scale, num_kv_heads, kv_cache_dtype=kv_cache_dtype, **asked)
        settings = self.settings()
        assert settings is not None, "a backend makes this layer for models with settings"
        self.served = settings
        if settings.key_conv is not None:
            from openmoba.vllm.key_conv import install_key_convolution  # needs vLLM

            install_key_convolution()

    @staticmethod
    def settings() -> Served | None:
        """Return the settings of the model that the layer is made for."""
        raise NotImplementedError

    def process_weights_after_loading(self, dtype: Any) -> None:
        """Take the weights as they were loaded.

        Raises:
            ValueError: those of a key convolution that the model has are missing.
        """
        parent: Any = super()
        parent.process_weights_after_loading(dtype)
        if self.key_conv is not None and bool(self.key_conv.weight.isnan().any()):
            raise ValueError(
                "this model's config.json says that it has a key convolution (key_conv), whose weights are not in its "
                "checkpoint; train it and save it, or convert a model without --key-conv"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *scales: Any,
        **more_scales: Any,
    ) -> Tensor:
        """Attend for a batch's new tokens, whose keys and values are in the cache, into `output` `[N, H, D]`."""
        self._check_keys(layer, attn_metadata)
        if attn_metadata is None or not self.served.is_sparse(layer.layer_name):
            parent: Any = super()
            parent.forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **more_scales)
            return output
        if any(scale is not None for scale in (*scales, *more_scales.values())):
            raise ValueError("MoBA does not quantise its output; start without fusing quantisation into attention")
        if attn_metadata.causal is not True:
            raise ValueError("MoBA is causal, and this batch is not; serve a model that generates text")
        tokens = attn_metadata.num_actual_tokens
        k_pages, v_pages = keys_and_values(kv_cache)
        # vLLM's table has room for the longest request that it takes; kernels are launched for every column.
        pages = -(-attn_metadata.max_seq_len // k_pages.shape[1])
        batch = (attn_metadata.block_table[:, :pages], attn_metadata.seq_lens, attn_metadata.query_start_loc)
        block_size = self.served.block_size
        centroids = self._centroids(k_pages)
        complete_paged(centroids, k_pages, *batch, block_size)
        output[:tokens] = moba_paged(
            query[:tokens],
            k_pages,
            v_pages,
            centroids,
            *batch,
            block_size=block_size,
            top_k=self.served.top_k,
            scale=self.scale,
        )
        return output

    def _check_keys(self, layer: Any, batch: Any) -> None:
        """Raise ValueError if a batch's keys went around the model's key convolution."""
        if batch is None or self.served.key_conv is None:
            return
        if self.key_conv is None or self.key_conv.batch is not batch:
            raise ValueError(
                f"the keys of {layer.layer_name} have not passed this model's key convolution, since vLLM computes "
                "them otherwise than by qkv_proj; generate with openmoba generate"
            )

    def _centroids(self, k_pages: Tensor) -> Tensor:
        """Return the centroids of a cache; made anew when vLLM has made another cache."""
        found = self.centroids
        if found is None or found.shape[0] != k_pages.shape[0]:
            self.centroids = found = new_paged_centroids(k_pages, self.served.block_size)
        return found


def keys_and_values(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values, `[Z, P, Hkv, D]` each, of a cache `[Z, Hkv, P, 2 * D]`."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, -1)
    return keys, values


def write_rows(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write new tokens' keys and values to their places in the cache.

    Args:
        key, value: `[N or more, Hkv, D]`.
        kv_cache: `[Z, Hkv, P, 2 * D]`.
        slots: int64 `[N]`, page times P plus place within the page; negative where nothing is to be written.
    """
    page_size = kv_cache.shape[2]
    tokens = (slots >= 0).nonzero()[:, 0]
    pages, places = slots[tokens] // page_size, slots[tokens] % page_size
    for states, cached in zip((key, value), keys_and_values(kv_cache), strict=True):
        cached[pages, places] = states[tokens].to(cached.dtype)
