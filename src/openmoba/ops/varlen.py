"""Full causal attention of packed sequences, without waiting for the device to learn where they lie."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from openmoba.ops.api import moba_attention

# In some releases heads that share keys have to be announced. Asked once, since compilers do not trace the question.
_SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def dense_sequences(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, scale: float
) -> Tensor:
    """Attend causally within each sequence, `[N, H, D]`, queries aligned to the end of their keys.

    Args:
        q_NHD: queries of all sequences, `[N, H, D]`; k_NHD and v_NHD: `[M, Hkv, D]`.
        cu_q, cu_k: int32 `[sequences + 1]`, where each sequence starts; empty ones are allowed.
        longest: upper bound of a sequence's keys.
        scale: factor on the logits.
    """
    if q_NHD.device.type == "cuda" and q_NHD.dtype in (torch.bfloat16, torch.float16):
        shared = _SHARED_KEYS if q_NHD.shape[1] != k_NHD.shape[1] else {}
        out = varlen_attn(q_NHD, k_NHD, v_NHD, cu_q, cu_k, longest, longest, scale=scale, window_size=(-1, 0), **shared)
        return cast(Tensor, out)  # without the sums, which nobody asked for
    # One block that holds a whole sequence is every query's own.
    return moba_attention(
        q_NHD, k_NHD, v_NHD, block_size=longest, top_k=1, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=scale
    )
