"""Attention by heads: ranks exchange tokens for heads, attend to whole sequences, and change back (Ulysses).

    before   rank n holds tokens of shard n, all H heads
    within   rank n holds all tokens, H / N heads, and the key/value heads that these share
    after    rank n holds tokens of shard n, all H heads

Within, the call is that of one device, so the choice of blocks is too. Where N divides the key/value heads nothing is
computed in another order, and outputs and gradients are one device's bit for bit. Elsewhere keys are repeated as often
as it takes, and their gradients summed.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openmoba.parallel.collectives import exchanged
from openmoba.parallel.cost import key_copies
from openmoba.parallel.sharding import Sharding

Attend = Callable[..., Tensor]
"""(q, k, v, cu_seqlens_q, cu_seqlens_k) -> out, as `openmoba.moba_attention`; with lists of blocks, these follow."""

# B batch, T tokens of the whole, S of a shard, N ranks, H heads, h heads of a rank, D head width


def attend_by_heads(
    attend: Attend, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, sharding: Sharding, lists: Tensor | None = None
) -> Tensor:
    """Return attention over the whole sequence, `[B, S, H, D]`, of this rank's tokens.

    Args:
        lists: of past blocks, `[B, S, H or Hkv, m]`, where `attend` takes some.
    """
    kv_heads = k_BSHD.shape[2]
    copies = key_copies(kv_heads, sharding.ranks)
    if copies > 1:
        k_BSHD, v_BSHD = (x.repeat_interleave(copies, 2) for x in (k_BSHD, v_BSHD))
        if lists is not None and lists.shape[2] == kv_heads:
            lists = lists.repeat_interleave(copies, 2)
    given = () if lists is None else _to_heads((lists,), sharding)
    q_BThD, k_BThD, v_BThD = _to_heads((q_BSHD, k_BSHD, v_BSHD), sharding)
    cu = sharding.cu_seqlens
    if cu is None:
        return _to_tokens(attend(q_BThD, k_BThD, v_BThD, None, None, *given), sharding)
    given = tuple(x[0] for x in given)
    return _to_tokens(attend(q_BThD[0], k_BThD[0], v_BThD[0], cu, cu, *given)[None], sharding)


def _to_heads(tensors: tuple[Tensor, ...], sharding: Sharding) -> tuple[Tensor, ...]:
    """Return all tokens `[B, T, h, D]` of this rank's heads, in one exchange."""
    ranks = sharding.ranks
    parts_BSNhD = [x.reshape(*x.shape[:2], ranks, x.shape[2] // ranks, x.shape[3]) for x in tensors]
    sent_NSBhD = torch.cat(parts_BSNhD, 3).permute(2, 1, 0, 3, 4)
    got_TBhD = exchanged(sent_NSBhD, ranks, sharding.group_name).flatten(0, 1)
    whole_BThD = sharding.in_order(got_TBhD)[: sharding.tokens].transpose(0, 1)
    return torch.split(whole_BThD, [x.shape[3] for x in parts_BSNhD], 2)


def _to_tokens(out_BThD: Tensor, sharding: Sharding) -> Tensor:
    """Return this rank's tokens `[B, S, H, D]` of all heads; the inverse of `_to_heads`."""
    padding = sharding.ranks * sharding.local_tokens - sharding.tokens
    whole_TBhD = torch.nn.functional.pad(out_BThD.transpose(0, 1), (0, 0, 0, 0, 0, 0, 0, padding))
    sent_NSBhD = sharding.by_rank(whole_TBhD).view(sharding.ranks, -1, *whole_TBhD.shape[1:])
    got_NSBhD: Tensor = exchanged(sent_NSBhD, sharding.ranks, sharding.group_name)
    return got_NSBhD.permute(2, 1, 0, 3, 4).flatten(2, 3)
