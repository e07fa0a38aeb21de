"""Dense causal attention through torch's SDPA: what MoBA is when `top_k` covers every block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, queries aligned to the end of the keys, `[B, T, H, D]`."""
    q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    grouped = q_BTHD.shape[2] != k_BSHD.shape[2]
    square = queries == keys
    mask = None if square or queries == 1 else _lower_right(queries, keys, q_BTHD.device)
    out_BHTD = scaled_dot_product_attention(
        q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
    )
    return out_BHTD.transpose(1, 2)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    if device.type == "cuda":
        mask: Tensor = causal_lower_right(queries, keys)
        return mask
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
