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
from typing import Any

import torch
from torch import Tensor

from openmoba.parallel.collectives import arrived, start, started, wait
from openmoba.parallel.copies import contiguous, copy_into
from openmoba.parallel.cost import heads_per_turn, key_copies
from openmoba.parallel.sharding import Sharding

Attend = Callable[..., Tensor]
"""(q, k, v, cu_seqlens_q, cu_seqlens_k) -> out, as `openmoba.moba_attention`; with lists of blocks, these follow."""

# B batch, T tokens of the whole, S of a shard, N ranks, t turns, H heads, h heads of a turn on one rank, D head width


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
    sent = _Sent.apply(turns, *_group(sharding), *tensors)  # type: ignore[no-untyped-call]
    coming = [sent[i : i + len(tensors)] for i in range(0, len(sent), len(tensors))]
    going = [_start_back(_attend(attend, turn, sharding), sharding) for turn in coming]
    out: Tensor = _Placed.apply(*_group(sharding), *going)  # type: ignore[no-untyped-call]
    return out


def _group(sharding: Sharding) -> tuple[int, str]:
    return sharding.ranks, sharding.group_name


def _heads_of_turn(x_BSHD: Tensor, turn: int, turns: int, ranks: int) -> Tensor:
    """Return a view of the heads that the ranks attend to in a turn, `[N, S, B, h, D]`."""
    batch, shard, heads, width = x_BSHD.shape
    x_BSNthD = x_BSHD.view(batch, shard, ranks, turns, heads // (ranks * turns), width)
    return x_BSNthD[:, :, :, turn].permute(2, 1, 0, 3, 4)


class _Sent(torch.autograd.Function):
    """Heads `[B, S, H, D]` of several tensors, on their way to the ranks that attend to them.

    They are `[N, S, B, h, D]`, one turn's of every tensor after the other's. Gradients are on their way here likewise.
    """

    @staticmethod
    def forward(ctx: Any, turns: int, ranks: int, group_name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.turns, ctx.ranks, ctx.shapes = turns, ranks, [x.shape for x in tensors]
        views = (_heads_of_turn(x, turn, turns, ranks) for turn in range(turns) for x in tensors)
        going = [start(contiguous(x), ranks, group_name) for x in views]
        constant = [x for i, x in enumerate(going) if not ctx.needs_input_grad[3 + i % len(tensors)]]
        ctx.mark_non_differentiable(*constant)
        return tuple(going)

    @staticmethod
    def backward(ctx: Any, *coming: Tensor) -> tuple[Tensor | None, ...]:
        step = len(ctx.shapes)
        gradients = {i: coming[i].new_empty(ctx.shapes[i]) for i in range(step) if ctx.needs_input_grad[3 + i]}
        for turn in reversed(range(ctx.turns)):
            for i, gradient in gradients.items():
                copy_into(_heads_of_turn(gradient, turn, ctx.turns, ctx.ranks), wait(coming[turn * step + i]))
        return None, None, None, *(gradients.get(i) for i in range(step))


class _Placed(torch.autograd.Function):
    """The transpose of `_Sent`: `[N, S, B, h, D]` of each turn, on their way, become the heads of one `[B, S, H, D]`.

    Those of a turn are copied when they are there, while a later turn's are on their way.
    """

    @staticmethod
    def forward(ctx: Any, ranks: int, group_name: str, *coming: Tensor) -> Tensor:
        ctx.turns, ctx.ranks, ctx.group_name = len(coming), ranks, group_name
        _, shard, batch, heads, width = coming[0].shape
        out = coming[0].new_empty(batch, shard, ranks * len(coming) * heads, width)
        for turn, x in enumerate(coming):
            copy_into(_heads_of_turn(out, turn, len(coming), ranks), wait(x))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        going = [
            start(contiguous(_heads_of_turn(gradient, turn, ctx.turns, ctx.ranks)), ctx.ranks, ctx.group_name)
            for turn in reversed(range(ctx.turns))  # the order in which they are needed
        ]
        return None, None, *reversed(going)


def _attend(attend: Attend, coming: tuple[Tensor, ...], sharding: Sharding) -> Tensor:
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
    by_rank_TBhD = sharding.by_rank(whole_TBhD)
    by_rank_NSBhD = by_rank_TBhD.view(sharding.ranks, sharding.local_tokens, *by_rank_TBhD.shape[1:])
    return started(by_rank_NSBhD, *_group(sharding))
