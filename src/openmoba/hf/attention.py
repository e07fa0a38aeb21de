"""The attention function registered with transformers under the name "moba"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from openmoba.hf.cache import PagedLayer
from openmoba.hf.eager import eager
from openmoba.hf.layers import LayerSettings, settings_of_layer
from openmoba.hf.masks import PADDING, visible_keys, whole_runs
from openmoba.hf.packing import packing_of, put_back, take
from openmoba.ops.api import moba_attention
from openmoba.ops.checks import needs_gradient
from openmoba.ops.decode import MAX_QUERIES, moba_decode
from openmoba.ops.dense import dense_attention
from openmoba.ops.varlen import dense_sequences

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
    moba_layer: PagedLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer: MoBA, or full attention in the layers that the settings name.

    Args:
        module: the attention layer; `module.moba` says what it computes, see `openmoba.hf.layers`.
        query: `[B, H, T, D]`; key and value: `[B, Hkv, S, D]`.
        attention_mask: a form of segment map (`openmoba.hf.masks`) or None.
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed sequences in the flattened batch, int32.
        moba_layer: this layer's part of the cache, handed over by `openmoba.hf.layers`.

    Returns:
        The output `[B, T, H, D]`, and None for the attention weights.

    Raises:
        ValueError: for anything MoBA does not compute, see `_UNSUPPORTED`, and for missing settings.
    """
    _refuse_variants(module, dropout, is_causal, kwargs)
    settings = settings_of_layer(module)
    attend = _Attention(settings, query.shape[-1] ** -0.5 if scaling is None else scaling)
    query, key, value = _in_autocast_dtype(query, key, value)
    q_BTHD, k_BSHD, v_BSHD = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is not None:
        _check_segment_map(attention_mask, k_BSHD)
        if attention_mask.shape[2] > 1:
            cu_seq_lens_q = cu_seq_lens_k = attention_mask.flatten()
        if attention_mask.shape[2] > 1 or attention_mask.shape[3] == 0:
            attention_mask = None
    padding_BT11 = None
    if cu_seq_lens_q is None and attention_mask is not None and _padding_attends_to_itself(q_BTHD, k_BSHD):
        cu_seq_lens_q = cu_seq_lens_k = whole_runs(attention_mask[:, 0, 0])
        padding_BT11 = attention_mask[:, 0, 0, :, None, None] == PADDING
        attention_mask = None
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
    return (out if padding_BT11 is None else out.masked_fill(padding_BT11, 0)).contiguous(), None


def _padding_attends_to_itself(q_BTHD: Tensor, k_BSHD: Tensor) -> bool:
    """Whether it has to: in a graph of whole rows, where what is padding cannot decide about shapes.

    The assertions that come with it stand outside of the change of autocast: a graph that fails does not undo it.
    """
    return torch.compiler.is_compiling() and q_BTHD.shape[1] == k_BSHD.shape[1]


@dataclass(frozen=True)
class _Attention:
    """What one layer computes, over whole rows or over sequences."""

    settings: LayerSettings
    scale: float

    def dense(self, k_BSHD: Tensor) -> bool:
        """Whether every query reads all its past keys, because the layer is full or the blocks are few."""
        return self.settings.full or self.settings.top_k * self.settings.block_size >= k_BSHD.shape[1]

    def packed(
        self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None, cu_q: Any, cu_k: Any
    ) -> Tensor:
        """Within the sequences that boundaries mark in the flattened batch."""
        if cu_q is None or cu_k is None:
            raise ValueError("packed batches need both cu_seq_lens_q and cu_seq_lens_k; they may be the same")
        if mask is not None:
            _refuse_padding(mask)
        q_NHD, k_NHD, v_NHD = (x.flatten(0, 1) for x in (q_BTHD, k_BSHD, v_BSHD))
        return self._sequences(q_NHD, k_NHD, v_NHD, cu_q.int(), cu_k.int(), k_NHD.shape[0]).view(q_BTHD.shape)

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
            block_size=self.settings.block_size,
            top_k=self.settings.top_k,
            scale=self.scale,
        )

    def masked(self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
        """Within whole rows, or within the sequences of a segment map; zero for padding."""
        if mask is None:
            return self._rows(q_BTHD, k_BSHD, v_BSHD)
        plan = packing_of(mask, q_BTHD.shape[1])
        q_NHD = take(q_BTHD, plan.queries)
        k_NHD, v_NHD = (take(x, plan.keys) for x in (k_BSHD, v_BSHD))
        out_NHD = self._sequences(q_NHD, k_NHD, v_NHD, plan.cu_q, plan.cu_k, k_BSHD.shape[1])
        return put_back(out_NHD, plan.queries, *q_BTHD.shape[:2])

    def _rows(self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        """Rows of one whole sequence each."""
        if self.settings.full:
            return dense_attention(q_BTHD, k_BSHD, v_BSHD, self.scale)
        return self._moba(q_BTHD, k_BSHD, v_BSHD, None, None)

    def _sequences(
        self, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int
    ) -> Tensor:
        """Packed sequences of at most `longest` keys."""
        if self.settings.full:
            return dense_sequences(q_NHD, k_NHD, v_NHD, cu_q, cu_k, longest, self.scale)
        return self._moba(q_NHD, k_NHD, v_NHD, cu_q, cu_k)

    def _moba(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
        return moba_attention(
            q,
            k,
            v,
            block_size=self.settings.block_size,
            top_k=self.settings.top_k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            scale=self.scale,
        )


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
    map_like = mask.shape in ((batch, 1, 1, slots), (batch, 1, 1, 0))
    if mask.dtype != torch.int32 or not (map_like or (mask.shape[:2] == (1, 1) and mask.shape[3] == 1)):
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
