"""Pages of a key cache: one fp32 key sum per block, kept up to date while keys arrive.

A page is a block: page p of row b covers the cache slots `starts[b] + p * block_size` and following, so that
blocks begin at the row's first real token whatever padding precedes it. Scoring with a page's sum ranks pages as
scoring with its mean does, and a sum can be continued: each new key is added to its page. An incomplete page holds
a partial sum, which nobody scores.

Everything here is tensor arithmetic on the cache's device without waiting for it, so it runs in CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# B batch rows, S cache slots, P pages, T new tokens, H key/value heads, D head width, K slots of a page


def new_pages(keys_BSHD: Tensor, slots: int, block_size: int) -> Tensor:
    """Zero sums for `slots` cache slots, `[B, P + 1, H, D]`; the last page takes what belongs to none."""
    batch, _, heads, width = keys_BSHD.shape
    pages = -(-slots // block_size) + 1
    dtype = torch.float64 if keys_BSHD.dtype == torch.float64 else torch.float32
    # Head-major in memory, as the keys are: a head's pages lie side by side.
    return torch.zeros(batch, heads, pages, width, dtype=dtype, device=keys_BSHD.device).transpose(1, 2)


def extend_pages(sum_BPHD: Tensor, new_BTHD: Tensor, starts_B: Tensor, begin: int | Tensor, block_size: int) -> None:
    """Add the keys of slots `begin, begin + 1, ...` to their pages; meant for few tokens."""
    spare = sum_BPHD.shape[1] - 1
    for t in range(new_BTHD.shape[1]):
        position_B = begin + t - starts_B
        page_B = torch.where(position_B >= 0, position_B // block_size, spare)
        key_B1HD = new_BTHD[:, t : t + 1].to(sum_BPHD.dtype)
        sum_BPHD.scatter_add_(1, page_B.long()[:, None, None, None].expand_as(key_B1HD), key_B1HD)


def refresh_pages(
    sum_BPHD: Tensor,
    keys_BSHD: Tensor,
    starts_B: Tensor,
    begin: int | Tensor,
    end: int | Tensor,
    tokens: int,
    block_size: int,
) -> None:
    """Recompute, from the cached keys, the pages that hold the slots from `begin` up to `end`; empty later ones.

    Args:
        tokens: an upper bound on `end - begin`, so that shapes do not depend on the data.
    """
    batch, slots, heads, width = keys_BSHD.shape
    spare = sum_BPHD.shape[1] - 1
    pages = min(spare, tokens // block_size + 2)
    device = keys_BSHD.device
    first_B = (begin - starts_B).clamp(min=0) // block_size
    page_BP = first_B[:, None] + torch.arange(pages, device=device)
    offset_K = torch.arange(block_size, device=device)
    slot_BPK = (starts_B[:, None] + page_BP * block_size)[:, :, None] + offset_K
    index = slot_BPK.clamp(max=slots - 1).long().view(batch, -1, 1, 1).expand(-1, -1, heads, width)
    key_BPKHD = keys_BSHD.gather(1, index).view(batch, pages, block_size, heads, width)
    key_BPKHD = key_BPKHD.masked_fill((slot_BPK >= end)[..., None, None], 0)
    later_BP = torch.arange(spare + 1, device=device) >= first_B[:, None]
    sum_BPHD.masked_fill_(later_BP[:, :, None, None], 0)
    target = page_BP.clamp(max=spare).long()[:, :, None, None].expand(-1, -1, heads, width)
    sum_BPHD.scatter_(1, target, key_BPKHD.sum(2, dtype=sum_BPHD.dtype))
