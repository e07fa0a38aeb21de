"""The attention function registered with transformers under the name "moba"."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from openmoba.hf.cache import PagedLayer
from openmoba.hf.eager import eager
from openmoba.hf.hook import attach
from openmoba.hf.masks import PADDING, visible_keys
from openmoba.hf.packing import packing_of, put_back, restarts_of, take
from openmoba.hf.settings import settings_of
from openmoba.ops.api import moba_attention
from openmoba.ops.checks import needs_gradient
from openmoba.ops.decode import MAX_QUERIES, moba_decode
from openmoba.ops.dense import dense_attention

# What models pass along for attention variants that MoBA does not have; None or False means "not used".
_UNSUPPORTED = {
    "sliding_window": "a sliding window; set sliding_window=None in the model configuration",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "output_attentions": "attention weights as an output; use attn_implementation='eager' for them",
}

# B batch, T queries, S keys, N tokens of all sequences, H heads, D head width


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    moba_layer: PagedLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer: MoBA, or full attention in the layers that the settings name.

    Args:
        module: the attention layer; `module.config` holds the settings, `module.layer_idx` its place.
        query: `[B, H, T, D]`; key and value: `[B, Hkv, S, D]`.
        attention_mask: a segment map (`openmoba.hf.masks`) or None.
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed sequences in the flattened batch, int32.
        position_ids: `[1 or B, T]`; where they restart, a packed sequence starts.
        moba_layer: this layer's part of the cache, handed over by `openmoba.hf.hook`.

    Returns:
        The output `[B, T, H, D]`, and None for the attention weights.

    Raises:
        ValueError: for anything MoBA does not compute, see `_UNSUPPORTED`, and for missing settings.
    """
    _refuse_variants(module, dropout, is_causal, kwargs)
    attach(module)
    attend = _Attention.of(module, query.shape[-1] ** -0.5 if scaling is None else scaling)
    query, key, value = _in_autocast_dtype(query, key, value)
    q_BTHD, k_BSHD, v_BSHD = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is not None:
        _check_segment_map(attention_mask, k_BSHD)
    elif cu_seq_lens_q is None and cu_seq_lens_k is None and q_BTHD.shape[1] == k_BSHD.shape[1]:
        cu_seq_lens_q = cu_seq_lens_k = _unmasked_restarts(position_ids, q_BTHD.shape[0])
    # The sums behind the choice of blocks are fp32; autocast would compute them in 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
            out = attend.packed(q_BTHD, k_BSHD, v_BSHD, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
        elif attend.dense(k_BSHD) and attention_mask is not None and q_BTHD.shape[1] <= MAX_QUERIES:
            mask = visible_keys(attention_mask, query.shape[2])
            out = sdpa_attention_forward(module, query, key, value, mask, scaling=attend.scale)[0]
        elif moba_layer is not None and not attend.dense(k_BSHD):
            out = attend.cached(q_BTHD, k_BSHD, v_BSHD, attention_mask, moba_layer)
        else:
            out = attend.masked(q_BTHD, k_BSHD, v_BSHD, attention_mask)
    return out.contiguous(), None


@dataclass(frozen=True)
class _Attention:
    """What one layer computes: MoBA with these blocks, or full attention; over whole rows or sequences."""

    block_size: int
    top_k: int
    full: bool
    scale: float

    @classmethod
    def of(cls, module: Any, scale: float) -> _Attention:
        settings = settings_of(module.config)
        full = module.layer_idx in settings.full_layer_indices(module.config.num_hidden_layers)
        return cls(settings.block_size, settings.top_k, full, scale)

    def dense(self, k_BSHD: Tensor) -> bool:
        """Whether every query reads all its past keys, because the layer is full or the blocks are few."""
        return self.full or self.top_k * self.block_size >= k_BSHD.shape[1]

    def packed(
        self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None, cu_q: Any, cu_k: Any
    ) -> Tensor:
        """Within the sequences that boundaries mark in the flattened batch."""
        if cu_q is None or cu_k is None:
            raise ValueError("packed batches need both cu_seq_lens_q and cu_seq_lens_k; they may be the same")
        if mask is not None:
            _refuse_padding(mask)
        q_NHD, k_NHD, v_NHD = (x.flatten(0, 1) for x in (q_BTHD, k_BSHD, v_BSHD))
        return self._sequences(q_NHD, k_NHD, v_NHD, cu_q.int(), cu_k.int()).view(q_BTHD.shape)

    def cached(self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None, layer: PagedLayer) -> Tensor:
        """After a cache with pages: a few tokens read the pages they choose."""
        alignment = layer.align(mask, k_BSHD)
        if alignment is None:
            return self.masked(q_BTHD, k_BSHD, v_BSHD, mask)
        queries = q_BTHD.shape[1]
        centroids = layer.pages(k_BSHD, alignment)
        trained = needs_gradient(q_BTHD, k_BSHD, v_BSHD)  # which `moba_decode` does not have
        if queries > MAX_QUERIES or queries == k_BSHD.shape[1] or trained:
            return self.masked(q_BTHD, k_BSHD, v_BSHD, mask)
        return moba_decode(
            q_BTHD,
            k_BSHD,
            v_BSHD,
            centroids,
            alignment.lengths,
            alignment.starts,
            block_size=self.block_size,
            top_k=self.top_k,
            scale=self.scale,
        )

    def masked(self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
        """Within whole rows, or within the sequences of a segment map; zero for padding."""
        if mask is not None:
            plan = packing_of(mask, q_BTHD.shape[1])
            q_NHD = take(q_BTHD, plan.queries)
            k_NHD, v_NHD = (take(x, plan.keys) for x in (k_BSHD, v_BSHD))
            out_NHD = self._sequences(q_NHD, k_NHD, v_NHD, plan.cu_q, plan.cu_k)
            return put_back(out_NHD, plan.queries, *q_BTHD.shape[:2])
        if self.full:
            return dense_attention(q_BTHD, k_BSHD, v_BSHD, self.scale)
        return moba_attention(q_BTHD, k_BSHD, v_BSHD, block_size=self.block_size, top_k=self.top_k, scale=self.scale)

    def _sequences(self, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        if self.full:
            return _dense_sequences(q_NHD, k_NHD, v_NHD, cu_q, cu_k, self.scale)
        return moba_attention(
            q_NHD,
            k_NHD,
            v_NHD,
            block_size=self.block_size,
            top_k=self.top_k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            scale=self.scale,
        )


@eager("one SDPA call per sequence: their number is a property of the data")
def _dense_sequences(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
    """Full causal attention, sequence by sequence: no `[N, N]` mask, and SDPA's fast causal kernels."""
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    parts = [
        dense_attention(q_NHD[None, q0:q1], k_NHD[None, k0:k1], v_NHD[None, k0:k1], scale)[0]
        for (q0, q1), (k0, k1) in bounds
        if q1 > q0
    ]
    return torch.cat(parts) if parts else torch.empty_like(q_NHD)


def _unmasked_restarts(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Boundaries by positions where transformers made no mask from them, as it does not with a cache.

    In a compiled model this is left to the mask: looking at the positions in every layer would cut the graph.
    """
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return None
    return restarts_of(position_ids, batch)


def _refuse_variants(module: Any, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"no attention dropout in MoBA, got {dropout}; set attention_dropout=0 in the model configuration"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ValueError("MoBA is causal attention, and this layer is not; use attn_implementation='sdpa'")
    for name, meaning in _UNSUPPORTED.items():
        used = kwargs.get(name)
        if used is not None and used is not False:
            raise ValueError(f"MoBA does not support {meaning} (layer {module.layer_idx} was given {name})")


def _check_segment_map(mask: Tensor, k_BSHD: Tensor) -> None:
    batch, slots = k_BSHD.shape[:2]
    if mask.dtype != torch.int32 or mask.shape != (batch, 1, 1, slots):
        raise ValueError(
            f"MoBA takes no custom attention mask, got {mask.dtype} {tuple(mask.shape)} for {slots} keys; "
            "pass a 2-D padding mask of the cached and new tokens, or use attn_implementation='sdpa'"
        )


@eager("reads the mask's values")
def _refuse_padding(segment_map: Tensor) -> None:
    if bool((segment_map == PADDING).any()):
        raise ValueError("a batch is either padded or packed: drop attention_mask or cu_seq_lens_q and cu_seq_lens_k")


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast queries and keys leave the rotary embedding in fp32, values stay in 16 bits."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)
