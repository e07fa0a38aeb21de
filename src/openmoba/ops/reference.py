"""MoBA as a specification: what is chosen, what is read, how results merge, and the same over a paged cache.

One dense mask, one softmax, plain torch, exact autograd, any precision. Nothing else defines these; every other
implementation is tested against this file.

Symbols (B batch, T queries, S keys, H query heads, Hkv key/value heads, D head width, N complete blocks, K blocks of
a list):

    c_n   = mean of the keys of block n                       `block_centroids`
    s_tn  = <q_t, c_n> for past blocks n < own(t)             `block_scores`
    sel_t = the top_k - 1 best s_tn, ties to the later block  `choose_blocks`
    I_t   = {j <= t : block(j) = own(t) or block(j) in sel_t} `attention_mask`
    o_t   = softmax(scale * q_t K[I_t]^T) V[I_t]              `attention_over`
    l_t   = log sum_(j in I_t) exp(scale * q_t k_j)           `attention_over`
    o     = sum_i exp(l_i - l) o_i,  l = log sum_i exp(l_i)   `reference_merge`, over sources that share no key

Source: MoBA technical report, arXiv 2502.13189, section 2.2. Memory is O(T * S) per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking, KeyCache
from openmoba.ops.centroids import ANCHOR_KEYS, LARGEST_FP16, ROOM


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums over numbers of `dtype` are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_centroids(k_BSHD: Tensor, block_size: int) -> Tensor:
    """Average the keys of every complete block, `[B, N, Hkv, D]`, in fp32 (fp64 for fp64 keys).

    The last incomplete block has none: it is the own block of every query that could have scored it.
    """
    batch, keys, heads, width = k_BSHD.shape
    complete = keys // block_size
    blocks = k_BSHD[:, : complete * block_size].reshape(batch, complete, block_size, heads, width)
    return blocks.to(accumulation_dtype(k_BSHD.dtype)).mean(2)


def block_scores(q_BTHD: Tensor, k_BSHD: Tensor, block_size: int) -> Tensor:
    """Score every query and complete block by `<q_t, c_n>`, `[B, T, H, N]`; `-inf` where n is not a past block."""
    centroid_BNHD = per_query_head(block_centroids(k_BSHD, block_size), q_BTHD.shape[2])
    score_BTHN = torch.einsum("bthd,bnhd->bthn", q_BTHD.to(centroid_BNHD.dtype), centroid_BNHD)
    own_T = query_positions(q_BTHD, k_BSHD) // block_size
    block_N = torch.arange(score_BTHN.shape[-1], device=own_T.device)
    # A block's mean mixes in all its keys, so scoring the own block would leak the future.
    return score_BTHN.masked_fill((block_N >= own_T[:, None])[None, :, None, :], -math.inf)


def choose_blocks(score_BTHN: Tensor, top_k: int) -> Tensor:
    """Choose the `top_k - 1` best past blocks per query, best first, int32 `[B, T, H, top_k - 1]`, -1 for none."""
    blocks = score_BTHN.shape[-1]
    wanted = min(top_k - 1, blocks)
    # A stable sort of the reversed blocks sends ties to the later block.
    value, index = score_BTHN.flip(-1).sort(dim=-1, descending=True, stable=True)
    value, index = value[..., :wanted], blocks - 1 - index[..., :wanted]
    chosen = index.masked_fill(value == -math.inf, -1)
    return torch.nn.functional.pad(chosen, (0, top_k - 1 - wanted), value=-1).int()


def attention_mask(selected_BTHK: Tensor, keys: int, block_size: int) -> Tensor:
    """Return the keys each query reads, bool `[B, H, T, S]`: past ones of its own and its selected blocks."""
    queries = selected_BTHK.shape[1]
    key_S = torch.arange(keys, device=selected_BTHK.device)
    position_T = key_S[keys - queries :]
    block_S = key_S // block_size
    own_TS = block_S == (position_T // block_size)[:, None]
    reads = own_TS[None, :, None, :].expand(*selected_BTHK.shape[:3], keys)
    for rank in range(selected_BTHK.shape[-1]):
        reads = reads | (block_S == selected_BTHK[..., rank, None])
    return (reads & (key_S <= position_T[:, None])[None, :, None, :]).transpose(1, 2)


def reference_select(q: Tensor, k: Tensor, blocking: Blocking) -> Tensor:
    """Choose as `openmoba.moba_select`, by definition."""
    cu_q, cu_k, block_size, top_k = blocking
    if cu_q is None or cu_k is None:
        with torch.no_grad():
            return choose_blocks(block_scores(q, k, block_size), top_k)
    parts = [
        choose_blocks(block_scores(q_1THD, k_1SHD, block_size), top_k)[0]
        for q_1THD, k_1SHD in zip(split_sequences(q, cu_q), split_sequences(k, cu_k), strict=True)
    ]
    return torch.cat(parts) if parts else q.new_empty((0, q.shape[1], top_k - 1), dtype=torch.int32)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, blocking: Blocking, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend as `openmoba.block_attention`, by definition, and `openmoba.moba_attention` if it is to choose the blocks.

    Output and log-sum-exp are differentiable in q, k and v, with the choice held fixed.
    """
    if blocks is None:
        blocks = reference_select(q, k, blocking)
    cu_q, cu_k, block_size, _ = blocking
    if cu_q is None or cu_k is None:
        mask = attention_mask(per_query_head(blocks, q.shape[2]), k.shape[1], block_size)
        return attention_over(q, k, v, mask, scale)
    packed = (q, cu_q), (k, cu_k), (v, cu_k), (blocks, cu_q)
    sequences = zip(*(split_sequences(x, cu) for x, cu in packed), strict=True)
    batch = Blocking(None, None, block_size, 0)
    parts = [
        reference_attention(its_q, its_k, its_v, its_blocks, batch, scale)
        for its_q, its_k, its_v, its_blocks in sequences
    ]
    out, lse = (torch.cat(x, 1)[0] for x in zip(*parts, strict=True))
    return out, lse


def attention_given_selection(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, selected_BTHK: Tensor, block_size: int, scale: float
) -> Tensor:
    """Attend by softmax over the own block and the given past blocks, `[B, T, H, D]` in q's dtype."""
    return reference_attention(q_BTHD, k_BSHD, v_BSHD, selected_BTHK, Blocking(None, None, block_size, 0), scale)[0]


def attention_over(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BHTS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by softmax over the keys that a mask allows, `[B, T, H, D]`; and its log-sum-exp, `[B, T, H]`.

    A query that reads no key gets zeros and a log-sum-exp of `-inf`.
    """
    heads = q_BTHD.shape[2]
    wide = accumulation_dtype(q_BTHD.dtype)
    k_BSHD, v_BSHD = (per_query_head(x, heads).to(wide) for x in (k_BSHD, v_BSHD))
    logit_BHTS = scale * torch.einsum("bthd,bshd->bhts", q_BTHD.to(wide), k_BSHD)
    some_BHT1 = mask_BHTS.any(-1, keepdim=True)
    logit_BHTS = logit_BHTS.masked_fill(~mask_BHTS & some_BHT1, -math.inf)  # a softmax over none would be NaN
    lse_BHT = logit_BHTS.logsumexp(-1).masked_fill(~some_BHT1[..., 0], -math.inf)
    weight_BHTS = logit_BHTS.softmax(-1).masked_fill(~mask_BHTS, 0)
    out_BTHD = torch.einsum("bhts,bshd->bthd", weight_BHTS, v_BSHD)
    return out_BTHD.to(q_BTHD.dtype), lse_BHT.transpose(1, 2)


def reference_merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge as `openmoba.merge_attention`, by definition."""
    lse_NBTH = torch.stack(tuple(lses))
    # Neither -inf - -inf nor what differentiates it may arise: a source without keys has the weight 0.
    none_NBTH = lse_NBTH == -math.inf
    nowhere_BTH = none_NBTH.all(0)
    top_BTH = lse_NBTH.detach().amax(0).masked_fill(nowhere_BTH, 0)
    weight_NBTH = (lse_NBTH.masked_fill(none_NBTH, 0) - top_BTH).exp().masked_fill(none_NBTH, 0)
    total_BTH = weight_NBTH.sum(0).masked_fill(nowhere_BTH, 1)
    lse_BTH = (top_BTH + total_BTH.log()).masked_fill(nowhere_BTH, -math.inf)
    weighted = [
        weight[..., None] * out.masked_fill(none[..., None], 0)  # over no key it may be NaN
        for weight, none, out in zip(weight_NBTH, none_NBTH, outs, strict=True)
    ]
    out_BTHD = torch.stack(weighted).sum(0) / total_BTH[..., None]
    return out_BTHD.to(outs[0].dtype), lse_BTH


def reference_decode(q: Tensor, cache: KeyCache, v_cache: Tensor, top_k: int, scale: float) -> Tensor:
    """Decode as `openmoba.moba_decode`, by definition, one query token after the other."""
    centroids, k_cache, lengths, starts, block_size = cache
    starts_B = torch.zeros_like(lengths) if starts is None else starts
    block_size = min(block_size, k_cache.shape[1])  # a larger one holds no more keys
    queries = q.shape[1]
    position_BT = lengths[:, None] - queries + _range(q, queries)

    def at(position_BHN: Tensor) -> tuple[Tensor, Tensor]:
        # Slots that are of no row may hold NaN, which a weight of 0 does not take away.
        position_BHN = position_BHN.clamp(min=0).minimum(lengths[:, None, None] - 1)
        slot_BHN = (starts_B[:, None, None] + position_BHN).clamp(0, k_cache.shape[1] - 1)
        place = _range(q, q.shape[0])[:, None, None], slot_BHN, key_head_of(q, k_cache)
        return k_cache[place], v_cache[place]

    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        rows = [
            decode_one(q[:, t], centroids, position_B, at, block_size, top_k, scale)
            for t, position_B in enumerate(position_BT.unbind(1))
        ]
    return torch.stack(rows, 1)


def decode_one(
    q_BHD: Tensor,
    centroid_BPHD: Tensor,
    position_B: Tensor,
    at: Callable[[Tensor], tuple[Tensor, Tensor]],
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    """Attend for one query per row, at `position_B` within the row: `[B, H, D]`.

    `at` gives keys and values `[B, H, N, D]` at positions `[B, H, N]` within rows, anything at those that are none.
    """
    own_B = position_B // block_size
    page_BHK = _choose_pages(q_BHD, centroid_BPHD, own_B, top_k)
    position_BHN = (page_BHK[..., None] * block_size + _range(q_BHD, block_size)).flatten(2)
    read_BHN = (position_BHN >= 0) & (position_BHN <= position_B[:, None, None])
    k_BHND, v_BHND = at(position_BHN)
    wide = accumulation_dtype(q_BHD.dtype)
    # A row times a matrix: on a CPU, libraries take seven times as long for a matrix times a column.
    logit_BHN = scale * (q_BHD.to(wide)[..., None, :] @ k_BHND.to(wide).transpose(-1, -2))[..., 0, :]
    weight_BHN = logit_BHN.masked_fill(~read_BHN, -math.inf).softmax(-1)
    out_BHD = (weight_BHN[..., None, :] @ v_BHND.to(wide))[..., 0, :]
    return out_BHD.masked_fill((position_B < 0)[:, None, None], 0).to(q_BHD.dtype)


def _choose_pages(q_BHD: Tensor, centroid_BPHD: Tensor, own_B: Tensor, top_k: int) -> Tensor:
    """Choose the own page and the `top_k - 1` best before it, int64 `[B, H, K]`; -1 for none."""
    heads, pages = q_BHD.shape[1], centroid_BPHD.shape[1]
    wide = accumulation_dtype(q_BHD.dtype)
    score_BHP = torch.einsum("bhd,bphd->bhp", q_BHD.to(wide), per_query_head(centroid_BPHD, heads).to(wide))
    past_BP = _range(q_BHD, pages) < own_B[:, None]
    score_BHP = score_BHP.masked_fill(~past_BP[:, None], -math.inf)
    past_BHK = choose_blocks(score_BHP, min(top_k, pages + 1)).long()
    return torch.cat([past_BHK, own_B.long()[:, None, None].expand(-1, heads, 1)], -1)


def key_head_of(q: Tensor, k: Tensor) -> Tensor:
    """Return the key head of each query head, `[H, 1]`; heads are the last but one dimension of both."""
    heads = q.shape[-2]
    return (_range(q, heads) // (heads // k.shape[-2]))[:, None]


@torch.no_grad()
def reference_complete_pages(cache: KeyCache, new: int) -> None:
    """Complete pages as `openmoba.complete_pages`, by definition, see `openmoba.ops.centroids`."""
    centroid_BPHD, key_BSHD, length_B, start_B, block_size = cache
    batch, pages, heads, width = centroid_BPHD.shape
    possible = min(pages, -(-new // block_size))
    if possible == 0:
        return
    start_B = torch.zeros_like(length_B) if start_B is None else start_B
    before_B1 = (length_B - new).clamp(min=0)[:, None]
    first_B1 = (before_B1 // block_size).clamp(max=pages - possible)
    page_BN = first_B1 + _range(key_BSHD, possible)
    end_BN = (page_BN + 1) * block_size
    done_BN = (end_BN > before_B1) & (end_BN <= length_B[:, None])

    wide = accumulation_dtype(key_BSHD.dtype)
    anchor_keys = _range(key_BSHD, min(ANCHOR_KEYS, block_size))
    first_BAHD = _at(key_BSHD, start_B, anchor_keys.expand(batch, -1)).to(wide)
    anchor_B1HD = first_BAHD.mean(1, keepdim=True)
    spread_BH = (first_BAHD - anchor_B1HD).abs().amax((1, 3))
    scale_BH = _power_of_two(torch.maximum(spread_BH, anchor_B1HD.abs().amax((1, 3)) / 64))

    position_BNK = page_BN[..., None] * block_size + _range(key_BSHD, block_size)
    key_BNKHD = _at(key_BSHD, start_B, position_BNK.flatten(1)).view(batch, possible, block_size, heads, width)
    centroid_BNHD = (key_BNKHD.to(wide).mean(2) - anchor_B1HD) * scale_BH[:, None, :, None]
    if centroid_BPHD.dtype == torch.float16:
        centroid_BNHD = centroid_BNHD.clamp(-LARGEST_FP16, LARGEST_FP16)
    place = _range(key_BSHD, batch)[:, None], page_BN.long()
    centroid_BNHD = centroid_BNHD.to(centroid_BPHD.dtype)
    centroid_BPHD[place] = torch.where(done_BN[..., None, None], centroid_BNHD, centroid_BPHD[place])


def _at(key_BSHD: Tensor, start_B: Tensor, position_BN: Tensor) -> Tensor:
    """Return keys `[B, N, H, D]` at positions within the rows; anything beyond the cache."""
    slot_BN = (start_B[:, None] + position_BN).clamp(max=key_BSHD.shape[1] - 1).long()
    return key_BSHD[_range(key_BSHD, start_B.shape[0])[:, None], slot_BN]


def _power_of_two(x: Tensor) -> Tensor:
    """Return the powers of two that take x > 0 into [2^ROOM, 2^(ROOM + 1)); 1 for 0."""
    exponent = (ROOM + 1 - torch.frexp(x).exponent).clamp(-126, 127).to(x.dtype)  # else powers are of the default dtype
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent), 1.0)


def query_positions(q_BTHD: Tensor, k_BSHD: Tensor) -> Tensor:
    """Return the position of each query among the keys, int64 `[T]`: queries are the last T positions."""
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    return torch.arange(keys - queries, keys, device=q_BTHD.device)


def split_sequences(x_THD: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Return the sequences of a packed tensor, each `[1, T_i, H, D]`."""
    return [x_THD[None, start:end] for start, end in pairwise(cu_seqlens.tolist())]


def per_query_head(x_BSHD: Tensor, heads: int) -> Tensor:
    """Repeat what each key/value head has for the query heads of its group; as it is if each query head has its own."""
    return x_BSHD.repeat_interleave(heads // x_BSHD.shape[2], dim=2)


def _range(like: Tensor, end: int) -> Tensor:
    return torch.arange(end, device=like.device)
