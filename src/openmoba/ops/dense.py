"""Dense causal attention: what MoBA is when `top_k` covers every block."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openmoba.ops import library


def dense_attention(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, queries aligned to the end of the keys, `[B, T, H, D]`.

    SDPA wherever it is causal without an explicit mask, whose memory would be quadratic. On CPU it is not with
    some but not all queries of a sequence; that is MoBA with one block, which every query owns.
    """
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    square = queries == keys
    if not square and queries > 1 and q_BTHD.device.type != "cuda":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BSHD, v_BSHD))
        return library.attention("cpu", q, k, v, None, None, keys, 1, scale)
    mask = None if square or queries == 1 else _lower_right(queries, keys)
    out_BHTD = scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=q_BTHD.shape[2] != k_BSHD.shape[2],
    )
    return out_BHTD.transpose(1, 2)


def _lower_right(queries: int, keys: int) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # imports triton where it is installed

    mask: Tensor = causal_lower_right(queries, keys)
    return mask
