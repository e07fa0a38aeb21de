"""The attention function registered with transformers under the name "moba"."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openmoba.config import MobaConfig
from openmoba.hf.eager import eager
from openmoba.hf.masks import PADDING
from openmoba.hf.packing import packing_of, put_back, restarts_of, take
from openmoba.hf.settings import settings_of
from openmoba.ops.api import moba_attention
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer: MoBA, or full attention in the layers that the settings name.

    Args:
        module: the attention layer; `module.config` holds the settings, `module.layer_idx` its place.
        query: `[B, H, T, D]`; key and value: `[B, Hkv, S, D]`.
        attention_mask: a segment map (`openmoba.hf.masks`) or None.
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed sequences in the flattened batch, int32.
        position_ids: `[1 or B, T]`; where they restart, a packed sequence starts.

    Returns:
        The output `[B, T, H, D]`, and None for the attention weights.

    Raises:
        ValueError: for anything MoBA does not compute, see `_UNSUPPORTED`, and for missing settings.
    """
    _refuse_variants(module, dropout, is_causal, kwargs)
    settings = settings_of(module.config)
    q_BTHD, k_BSHD, v_BSHD = (x.transpose(1, 2) for x in _in_autocast_dtype(query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    full = module.layer_idx in settings.full_layer_indices(module.config.num_hidden_layers)
    if attention_mask is not None:
        _check_segment_map(attention_mask, k_BSHD)
    elif cu_seq_lens_q is None and cu_seq_lens_k is None and q_BTHD.shape[1] == k_BSHD.shape[1]:
        cu_seq_lens_q = cu_seq_lens_k = _unmasked_restarts(position_ids, q_BTHD.shape[0])
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if attention_mask is not None:
            _refuse_padding(attention_mask)
        out = _packed(q_BTHD, k_BSHD, v_BSHD, cu_seq_lens_q, cu_seq_lens_k, settings, scale, full)
    elif attention_mask is not None:
        out = _ragged(q_BTHD, k_BSHD, v_BSHD, attention_mask, settings, scale, full)
    elif full:
        out = dense_attention(q_BTHD, k_BSHD, v_BSHD, scale)
    else:
        out = moba_attention(
            q_BTHD, k_BSHD, v_BSHD, block_size=settings.block_size, top_k=settings.top_k, scale=scale
        )
    return out.contiguous(), None


def _packed(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    settings: MobaConfig,
    scale: float,
    full: bool,
) -> Tensor:
    """Attention within the sequences that the boundaries mark in the flattened batch."""
    if cu_q is None or cu_k is None:
        raise ValueError("packed batches need both cu_seq_lens_q and cu_seq_lens_k; they may be the same")
    q_NHD, k_NHD, v_NHD = (x.flatten(0, 1) for x in (q_BTHD, k_BSHD, v_BSHD))
    out_NHD = _by_sequence(q_NHD, k_NHD, v_NHD, cu_q.int(), cu_k.int(), settings, scale, full)
    return out_NHD.view(q_BTHD.shape)


def _ragged(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    segment_map: Tensor,
    settings: MobaConfig,
    scale: float,
    full: bool,
) -> Tensor:
    """Attention within the sequences of a segment map; zero for padding."""
    batch, queries = q_BTHD.shape[:2]
    plan = packing_of(segment_map, queries)
    q_NHD = take(q_BTHD, plan.queries)
    k_NHD, v_NHD = (take(x, plan.keys) for x in (k_BSHD, v_BSHD))
    out_NHD = _by_sequence(q_NHD, k_NHD, v_NHD, plan.cu_q, plan.cu_k, settings, scale, full)
    return put_back(out_NHD, plan.queries, batch, queries)


def _by_sequence(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    settings: MobaConfig,
    scale: float,
    full: bool,
) -> Tensor:
    if full:
        return _dense_sequences(q_NHD, k_NHD, v_NHD, cu_q, cu_k, scale)
    return moba_attention(
        q_NHD,
        k_NHD,
        v_NHD,
        block_size=settings.block_size,
        top_k=settings.top_k,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        scale=scale,
    )


@eager("one SDPA call per sequence: their number is a property of the data")
def _dense_sequences(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float
) -> Tensor:
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
        raise ValueError(
            "a batch is either padded or packed: drop attention_mask or cu_seq_lens_q and cu_seq_lens_k"
        )


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast queries and keys leave the rotary embedding in fp32, values stay in 16 bits."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)
