"""The attention function registered with transformers under the name "moba"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from openmoba.hf.cache import KeptLayer
from openmoba.hf.kinds import Kind, Moba
from openmoba.hf.layers import kind_of_layer
from openmoba.hf.layout import Layout, take
from openmoba.hf.shards import attend_sharded
from openmoba.hf.support import DROPOUTS
from openmoba.ops.checks import needs_gradient
from openmoba.ops.decode import MAX_QUERIES
from openmoba.parallel.current import current_sharding

# What models pass along for attention variants that MoBA does not have; None or False means "not used".
_UNSUPPORTED = {
    "sliding_window": "a sliding window; set sliding_window=None in the model configuration",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "indices": "a choice of keys by an indexer",
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
    moba_layer: KeptLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute one attention layer, of the kind that the settings say.

    Args:
        module: the attention layer; `module.moba` is its kind of attention, see `openmoba.hf.layers`.
        query: `[B, H, T, D]`; key and value: `[B, Hkv, S, D]`.
        attention_mask: a form of `openmoba.hf.layout`, or None.
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed sequences in the flattened batch, int32.
        moba_layer: this layer's part of the cache, handed over by `openmoba.hf.layers`.

    Returns:
        The output `[B, T, H, D]`, and None for the attention weights.

    Raises:
        ValueError: for anything MoBA does not compute, see `_UNSUPPORTED`, and for missing settings.
    """
    _refuse_variants(module, dropout, is_causal, kwargs)
    kind = kind_of_layer(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    (batch, _, queries, _), slots = query.shape, key.shape[2]
    layout = Layout.read(attention_mask, cu_seq_lens_q, cu_seq_lens_k, (batch, queries), slots)
    query, key, value = _in_autocast_dtype(query, key, value)
    q_BTHD, k_BSHD, v_BSHD = (x.transpose(1, 2) for x in (query, key, value))
    sharding = current_sharding()
    if sharding is not None:
        return attend_sharded(kind, q_BTHD, k_BSHD, v_BSHD, sharding, scale, layout), None
    reads_all = kind.reads_all(slots)
    if reads_all and layout.is_step:
        mask = layout.visible_keys()
        out = sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]
    elif reads_all or moba_layer is None:
        out = _at_once(kind, q_BTHD, k_BSHD, v_BSHD, layout, scale)
    else:
        out = _after_pages(kind, q_BTHD, k_BSHD, v_BSHD, layout, moba_layer, scale)
    return out.contiguous(), None


def _at_once(kind: Kind, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attend within whole rows, or within the sequences of a layout; zero for padding."""
    sequences = layout.sequences()
    if sequences is None:
        return kind.rows(q_BTHD, k_BSHD, v_BSHD, scale)
    q_NHD = take(q_BTHD, sequences.queries)
    k_NHD, v_NHD = (take(x, sequences.keys) for x in (k_BSHD, v_BSHD))
    return sequences.put_back(kind.sequences(q_NHD, k_NHD, v_NHD, sequences, scale), q_BTHD)


def _after_pages(
    kind: Kind, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: Layout, layer: KeptLayer, scale: float
) -> Tensor:
    """Attend after a cache with pages, which it brings up to date: a few tokens read the pages they choose."""
    pages = layer.pages(k_BSHD, layout)
    trained = needs_gradient(q_BTHD, k_BSHD, v_BSHD)  # which a step does not have
    if pages is None or trained or q_BTHD.shape[1] > MAX_QUERIES or q_BTHD.shape[1] == k_BSHD.shape[1]:
        return _at_once(kind, q_BTHD, k_BSHD, v_BSHD, layout, scale)
    assert isinstance(kind, Moba)  # no other kind has pages
    return kind.step(q_BTHD, k_BSHD, v_BSHD, pages, scale)


def _refuse_variants(module: Any, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"no attention dropout in MoBA, got {dropout}; load the model with {DROPOUTS[0]}=0, which some families "
            f"call {' or '.join(DROPOUTS[1:])}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ValueError("MoBA is causal attention, and this layer is not; use attn_implementation='sdpa'")
    for name, meaning in _UNSUPPORTED.items():
        used = kwargs.get(name)
        if used is not None and used is not False:
            raise ValueError(f"MoBA does not support {meaning} (layer {module.layer_idx} was given {name})")


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype: queries and keys leave the rotary embedding in fp32, values stay in 16 bits."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)
