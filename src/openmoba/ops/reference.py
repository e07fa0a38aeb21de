"""MoBA as a specification: one dense mask, one softmax, plain torch, exact autograd, any precision.

Symbols (B batch, T queries, S keys, H query heads, Hkv key/value heads, D head width, N complete blocks):

    c_n   = mean of the keys of block n                       `block_centroids`
    s_tn  = <q_t, c_n> for past blocks n < own(t)             `block_scores`
    sel_t = the top_k - 1 best s_tn, ties to the later block  `choose_blocks`
    I_t   = {j <= t : block(j) = own(t) or block(j) in sel_t} `attention_mask`
    o_t   = softmax(scale * q_t K[I_t]^T) V[I_t]              `reference_attention`

Source: MoBA technical report, arXiv 2502.13189, section 2.2. Memory is O(T * S) per head.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def block_centroids(k_BSHD: Tensor, block_size: int) -> Tensor:
    """Mean key of every complete block, `[B, N, Hkv, D]`, in fp32 (fp64 for fp64 keys).

    The last incomplete block has none: it is the own block of every query that could have scored it.
    """
    batch, keys, heads, width = k_BSHD.shape
    complete = keys // block_size
    blocks = k_BSHD[:, : complete * block_size].reshape(batch, complete, block_size, heads, width)
    return blocks.to(_accumulation(k_BSHD.dtype)).mean(2)


def block_scores(q_BTHD: Tensor, k_BSHD: Tensor, block_size: int) -> Tensor:
    """`<q_t, c_n>` for every query and complete block, `[B, T, H, N]`; `-inf` where n is not a past block."""
    centroid_BNHD = _per_query_head(block_centroids(k_BSHD, block_size), q_BTHD.shape[2])
    score_BTHN = torch.einsum("bthd,bnhd->bthn", q_BTHD.to(centroid_BNHD.dtype), centroid_BNHD)
    own_T = query_positions(q_BTHD, k_BSHD) // block_size
    block_N = torch.arange(score_BTHN.shape[-1], device=own_T.device)
    # A block's mean mixes in all its keys, so scoring the own block would leak the future.
    return score_BTHN.masked_fill((block_N >= own_T[:, None])[None, :, None, :], -math.inf)


def choose_blocks(score_BTHN: Tensor, top_k: int) -> Tensor:
    """The `top_k - 1` best past blocks per query, best first, int32 `[B, T, H, top_k - 1]`, -1 for none."""
    blocks = score_BTHN.shape[-1]
    wanted = min(top_k - 1, blocks)
    # A stable sort of the reversed blocks sends ties to the later block.
    value, index = score_BTHN.flip(-1).sort(dim=-1, descending=True, stable=True)
    value, index = value[..., :wanted], blocks - 1 - index[..., :wanted]
    chosen = index.masked_fill(value == -math.inf, -1)
    return torch.nn.functional.pad(chosen, (0, top_k - 1 - wanted), value=-1).int()


def attention_mask(selected_BTHK: Tensor, keys: int, block_size: int) -> Tensor:
    """Keys each query reads, bool `[B, H, T, S]`: past keys of its own block and of its selected blocks."""
    queries = selected_BTHK.shape[1]
    key_S = torch.arange(keys, device=selected_BTHK.device)
    position_T = key_S[keys - queries :]
    block_S = key_S // block_size
    own_TS = block_S == (position_T // block_size)[:, None]
    reads = own_TS[None, :, None, :].expand(*selected_BTHK.shape[:3], keys)
    for rank in range(selected_BTHK.shape[-1]):
        reads = reads | (block_S == selected_BTHK[..., rank, None])
    return (reads & (key_S <= position_T[:, None])[None, :, None, :]).transpose(1, 2)


def reference_select(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    top_k: int,
) -> Tensor:
    """`openmoba.moba_select` by definition."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        with torch.no_grad():
            return choose_blocks(block_scores(q, k, block_size), top_k)
    parts = [
        reference_select(q_1THD, k_1SHD, None, None, block_size, top_k)[0]
        for q_1THD, k_1SHD in zip(split_sequences(q, cu_seqlens_q), split_sequences(k, cu_seqlens_k), strict=True)
    ]
    return torch.cat(parts) if parts else q.new_empty((0, q.shape[1], top_k - 1), dtype=torch.int32)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    """`openmoba.moba_attention` by definition; differentiable in q, k and v, with the choice held fixed."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        selected = reference_select(q, k, None, None, block_size, top_k)
        return attention_given_selection(q, k, v, selected, block_size, scale)
    sequences = zip(
        split_sequences(q, cu_seqlens_q),
        split_sequences(k, cu_seqlens_k),
        split_sequences(v, cu_seqlens_k),
        strict=True,
    )
    parts = [reference_attention(*qkv, None, None, block_size, top_k, scale)[0] for qkv in sequences]
    return torch.cat(parts) if parts else torch.empty_like(q)


def attention_given_selection(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, selected_BTHK: Tensor, block_size: int, scale: float
) -> Tensor:
    """Softmax attention over the own block and the given past blocks, `[B, T, H, D]` in q's dtype."""
    heads = q_BTHD.shape[2]
    wide = _accumulation(q_BTHD.dtype)
    k_BSHD, v_BSHD = (_per_query_head(x, heads).to(wide) for x in (k_BSHD, v_BSHD))
    logit_BHTS = scale * torch.einsum("bthd,bshd->bhts", q_BTHD.to(wide), k_BSHD)
    mask_BHTS = attention_mask(selected_BTHK, k_BSHD.shape[1], block_size)
    weight_BHTS = logit_BHTS.masked_fill(~mask_BHTS, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weight_BHTS, v_BSHD).to(q_BTHD.dtype)


def query_positions(q_BTHD: Tensor, k_BSHD: Tensor) -> Tensor:
    """Position of each query among the keys, int64 `[T]`: queries are the last T positions."""
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    return torch.arange(keys - queries, keys, device=q_BTHD.device)


def split_sequences(x_THD: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The sequences of a packed tensor, each `[1, T_i, H, D]`."""
    return [x_THD[None, start:end] for start, end in pairwise(cu_seqlens.tolist())]


def _per_query_head(x_BSHD: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads of its group."""
    return x_BSHD.repeat_interleave(heads // x_BSHD.shape[2], dim=2)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
