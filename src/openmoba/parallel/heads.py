"""Attention by heads: ranks exchange tokens for heads, attend to whole sequences, and change back (Ulysses).

    before   rank n holds tokens of shard n, all H heads
    within   rank n holds all tokens, H / N heads, and the key/value heads that these share
    after    rank n holds tokens of shard n, all H heads

Within, the call is that of one device, so the choice of blocks is too. Where N divides the key/value heads nothing is
computed in another order, and outputs and gradients are one device's bit for bit. Elsewhere keys are repeated as often
as it takes, and their gradients summed.

Long sequences go some key/value heads at a time: while a turn computes, the next one's tokens are on their way here and
the last one's output back. So it is in the backward pass, where autograd takes the same nodes in the other order.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openmoba.parallel.collectives import arrived, started
from openmoba.parallel.cost import heads_per_turn, key_copies
from openmoba.parallel.sharding import Sharding

Attend = Callable[..., Tensor]
"""(q, k, v, cu_seqlens_q, cu_seqlens_k) -> out, as `openmoba.moba_attention`; with lists of blocks, these follow."""

# B batch, T tokens of the whole, S of a shard, N ranks, H heads, h heads of a turn on one rank, D head width


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
    own = k_BSHD.shape[2] // sharding.ranks
    # The last dimensions differ in width, but a turn's share of each is the same.
    turns = own // heads_per_turn(own, (q_BSHD.nbytes + 2 * k_BSHD.nbytes) // own)
    tensors = (q_BSHD, k_BSHD, v_BSHD) if lists is None else (q_BSHD, k_BSHD, v_BSHD, lists)
    split = [_split_heads(x, turns, sharding) for x in tensors]
    coming = [[started(x, *_group(sharding)) for x in turn] for turn in zip(*split, strict=True)]
    going = [_start_back(_attend(attend, turn, sharding), sharding) for turn in coming]
    outs_BSNhD = [arrived(x, *_group(sharding)).permute(2, 1, 0, 3, 4) for x in going]
    return torch.cat(outs_BSNhD, 3).flatten(2, 3)


def _group(sharding: Sharding) -> tuple[int, str]:
    return sharding.ranks, sharding.group_name


def _split_heads(x_BSHD: Tensor, turns: int, sharding: Sharding) -> list[Tensor]:
    """Return what every rank is sent in each turn, `[N, S, B, h, D]`."""
    x_BSNhD = x_BSHD.reshape(*x_BSHD.shape[:2], sharding.ranks, -1, x_BSHD.shape[3])
    parts = [x_BSNhD] if turns == 1 else torch.split(x_BSNhD, x_BSNhD.shape[3] // turns, 3)
    return [part.permute(2, 1, 0, 3, 4).contiguous() for part in parts]


def _attend(attend: Attend, coming: list[Tensor], sharding: Sharding) -> Tensor:
    """Return the output of a turn's heads for all tokens, `[B, T, h, D]`."""
    q, k, v, *given = (_whole(arrived(x, *_group(sharding)), sharding) for x in coming)
    cu = sharding.cu_seqlens
    if cu is None:
        return attend(q, k, v, None, None, *given)
    return attend(q[0], k[0], v[0], cu, cu, *(x[0] for x in given))[None]


def _whole(got_NSBhD: Tensor, sharding: Sharding) -> Tensor:
    """Return all tokens `[B, T, h, D]`; without padding a view, and so is its gradient."""
    whole_TBhD = sharding.in_order(got_NSBhD.flatten(0, 1))
    return (whole_TBhD[: sharding.tokens] if sharding.padding else whole_TBhD).transpose(0, 1)


def _start_back(out_BThD: Tensor, sharding: Sharding) -> Tensor:
    """Start to send the output to the ranks that hold its tokens; what arrives is `[N, S, B, h, D]`."""
    whole_TBhD = out_BThD.transpose(0, 1)
    if sharding.padding:
        whole_TBhD = torch.nn.functional.pad(whole_TBhD, (0, 0, 0, 0, 0, 0, 0, sharding.padding))
    by_rank_TBhD = sharding.by_rank(whole_TBhD).contiguous()
    return started(by_rank_TBhD.view(sharding.ranks, -1, *by_rank_TBhD.shape[1:]), *_group(sharding))
