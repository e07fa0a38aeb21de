"""The choice of blocks in torch operations: chunk by chunk, so that memory stays linear in tokens.

Suffixes: B batch, T queries, S keys, H query heads, J key/value heads, G query heads per key/value head,
D head width, N blocks, K = top_k - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.checks import check_boundary_values

# Scores computed at a time: 2 MB of int64 sort keys stay in a core's L2 cache.
SCORES_AT_ONCE = 2**18
_NONE = torch.iinfo(torch.int64).min
_LOW_32_BITS = 2**32 - 1
_NEGATIVE_INFINITY = ~0x7F800000  # the high half of its sort key


def select(q: Tensor, k: Tensor, blocking: Blocking) -> Tensor:
    """Choose as `openmoba.moba_select` does, on CPU: int32 `[*q.shape[:-1], top_k - 1]`."""
    cu_q, cu_k, block_size, top_k = blocking
    if cu_q is None or cu_k is None:
        return _select_batch(q, k, block_size, top_k)
    check_boundary_values(cu_q, cu_k, len(q), len(k))
    selected = q.new_empty((*q.shape[:-1], top_k - 1), dtype=torch.int32)
    for (q_start, q_end), (k_start, k_end) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        sequence = q[None, q_start:q_end], k[None, k_start:k_end]
        selected[q_start:q_end] = _select_batch(*sequence, block_size, top_k)[0]
    return selected


def _select_batch(q_BTHD: Tensor, k_BSJD: Tensor, block_size: int, top_k: int) -> Tensor:
    batch, queries, heads = q_BTHD.shape[:3]
    offset, kv_heads = k_BSJD.shape[1] - queries, k_BSJD.shape[2]
    q_BTJGD = torch.unflatten(q_BTHD, 2, (kv_heads, -1))
    selected_BTHK = q_BTHD.new_full((batch, queries, heads, top_k - 1), -1, dtype=torch.int32)
    centroid_BJDN = _centroids(k_BSJD, block_size).permute(0, 2, 3, 1).double().contiguous()
    for start, end in _query_ranges(queries, offset, block_size, batch * heads):
        past = (offset + end - 1) // block_size
        wanted = min(top_k - 1, past)
        if wanted == 0:
            continue
        q_BJRD = q_BTJGD[:, start:end].permute(0, 2, 1, 3, 4).flatten(2, 3).double()
        # A matrix product sums in an order that depends on where an entry lies. Rounded from fp64, equal centroids get
        # equal scores wherever they lie, and a query the same scores however a sequence is cut.
        score_BJRN = (q_BJRD @ centroid_BJDN[..., :past]).float()
        sort_key_BJTGN = torch.unflatten(_sort_keys(score_BJRN), 2, (end - start, -1))
        own_T = torch.arange(offset + start, offset + end, device="cpu") // block_size
        sort_key_BJTGN.masked_fill_((torch.arange(past, device="cpu") >= own_T[:, None])[:, None], _NONE)
        best_BTJGK = sort_key_BJTGN.topk(wanted).values.permute(0, 2, 1, 3, 4)
        selected_BTHK[:, start:end, :, :wanted] = _block_numbers(best_BTJGK).flatten(2, 3)
    return selected_BTHK


def _centroids(k_BSJD: Tensor, block_size: int) -> Tensor:
    """Average the keys of the complete blocks, fp32 sums, `[B, N, J, D]`; keys are widened some blocks at a time."""
    blocks = k_BSJD.shape[1] // block_size
    k_BNLJD = torch.unflatten(k_BSJD[:, : blocks * block_size], 1, (blocks, block_size))
    at_once = max(1, SCORES_AT_ONCE // max(1, k_BNLJD[:, :1].numel()))
    return torch.cat([part.float().mean(2) for part in torch.split(k_BNLJD, at_once, dim=1)], dim=1)


def _query_ranges(queries: int, offset: int, block_size: int, rows_per_query: int) -> Iterator[tuple[int, int]]:
    """Cut the queries so that each range makes about SCORES_AT_ONCE scores against the blocks before its end."""
    start = 0
    while start < queries:
        # count * (offset + start + count) / block_size * rows_per_query = SCORES_AT_ONCE
        position, area = offset + start, SCORES_AT_ONCE * block_size / rows_per_query
        count = 2 * area / (position + math.sqrt(position**2 + 4 * area))
        end = min(queries, start + max(1, int(count)))
        yield start, end
        start = end


def _sort_keys(score_BJRN: Tensor) -> Tensor:
    """Return int64 that order like (score, block number): equal scores go to the later block, NaN counts as inf."""
    finite = score_BJRN.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf).add_(0.0)  # -0.0 is 0.0
    bits = finite.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement order is the order of floats
    return (ordered.long() << 32).bitwise_or_(torch.arange(score_BJRN.shape[-1], device="cpu"))


def _block_numbers(sort_key: Tensor) -> Tensor:
    """Return the block number inside each sort key, -1 where the score was -inf or the block not in the past."""
    return (sort_key & _LOW_32_BITS).masked_fill_(sort_key >> 32 <= _NEGATIVE_INFINITY, -1).int()
