"""Attention by heads: ranks exchange tokens for heads, attend to whole sequences, and change back (Ulysses).

    before   rank n holds tokens of shard n, all H heads
    within   rank n holds all tokens, H / N heads, and the key/value heads that these share
    after    rank n holds tokens of shard n, all H heads

Within, the call is that of one device, so the choice of blocks is too. Where N divides the key/value heads nothing is
computed in another order, and outputs and gradients are one device's bit for bit. Elsewhere keys are repeated as often
as it takes, and their gradients summed.

Long sequences go some key/value heads at a time: while a turn computes, the next one's tokens are on their way here and
the last one's output back. So it is in the backward pass, where autograd takes the same nodes in the other order. All
tensors of a turn travel in one exchange.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openmoba.ops.eager import eager
from openmoba.parallel.collectives import Exchange, arrived, started
from openmoba.parallel.copies import copy_into
from openmoba.parallel.cost import heads_per_turn, key_copies
from openmoba.parallel.sharding import Sharding

Attend = Callable[..., Tensor]
"""(q, k, v, cu_seqlens_q, cu_seqlens_k) -> out, as `openmoba.moba_attention`; with lists of blocks, these follow."""

# B batch, T tokens of the whole, S of a shard, N ranks, t turns, H heads, h heads of a turn on one rank, D head width


@eager("compilers do not trace transfers")
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
    there, back = ([Exchange(sharding.group) for _ in range(turns)] for _ in range(2))
    try:
        sent = _Sent.apply(there, *tensors)  # type: ignore[no-untyped-call]
        going: list[Tensor] = []
        for turn in range(turns):
            coming = arrived(there[turn], *sent[turn * len(tensors) : (turn + 1) * len(tensors)])
            going += started(back[turn], _by_rank(_attend(attend, coming, sharding), sharding))
        out: Tensor = _Placed.apply(back, *going)  # type: ignore[no-untyped-call]
    finally:  # checkpointing leaves in the middle, by an exception
        for exchange in (*there, *back):
            exchange.wait()
    return out


def _heads_of_turn(x_BSHD: Tensor, turn: int, turns: int, ranks: int) -> Tensor:
    """Return a view of the heads that the ranks attend to in a turn, `[N, S, B, h, D]`."""
    batch, shard, heads, width = x_BSHD.shape
    x_BSNthD = x_BSHD.view(batch, shard, ranks, turns, heads // (ranks * turns), width)
    return x_BSNthD[:, :, :, turn].permute(2, 1, 0, 3, 4)


class _Sent(torch.autograd.Function):
    """Heads `[B, S, H, D]` of several tensors, on their way to the ranks that attend to them.

    They are `[N, S, B, h, D]`, one turn's of every tensor after the other's. Each turn has an exchange, in which its
    gradients come here too.
    """

    @staticmethod
    def forward(ctx: Any, exchanges: Sequence[Exchange], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchanges, ctx.shapes, turns = exchanges, [x.shape for x in tensors], len(exchanges)
        coming: list[Tensor] = []
        for turn, exchange in enumerate(exchanges):
            coming += exchange.start(*(_heads_of_turn(x, turn, turns, exchange.ranks) for x in tensors))
        constant = [x for i, x in enumerate(coming) if not ctx.needs_input_grad[1 + i % len(tensors)]]
        ctx.mark_non_differentiable(*constant)
        return tuple(coming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *coming: Tensor) -> tuple[Tensor | None, ...]:
        step, turns = len(ctx.shapes), len(ctx.exchanges)
        gradients = {i: coming[i].new_empty(ctx.shapes[i]) for i in range(step) if ctx.needs_input_grad[1 + i]}
        for turn, exchange in reversed(list(enumerate(ctx.exchanges))):
            exchange.wait()
            for i, gradient in gradients.items():
                copy_into(_heads_of_turn(gradient, turn, turns, exchange.ranks), coming[turn * step + i])
        return None, *(gradients.get(i) for i in range(step))


class _Placed(torch.autograd.Function):
    """The transpose of `_Sent`: `[N, S, B, h, D]` of each turn, on their way, become the heads of one `[B, S, H, D]`.

    Those of a turn are copied when they are there, while a later turn's are on their way.
    """

    @staticmethod
    def forward(ctx: Any, exchanges: Sequence[Exchange], *coming: Tensor) -> Tensor:
        ctx.exchanges, turns = exchanges, len(exchanges)
        ranks, shard, batch, heads, width = coming[0].shape
        out = coming[0].new_empty(batch, shard, ranks * turns * heads, width)
        for turn, (exchange, x) in enumerate(zip(exchanges, coming, strict=True)):
            exchange.wait()
            copy_into(_heads_of_turn(out, turn, turns, ranks), x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        turns, coming = len(ctx.exchanges), []
        for turn, exchange in reversed(list(enumerate(ctx.exchanges))):  # the order in which they are needed
            coming += exchange.start(_heads_of_turn(gradient, turn, turns, exchange.ranks))
        return None, *reversed(coming)


def _attend(attend: Attend, coming: tuple[Tensor, ...], sharding: Sharding) -> Tensor:
    """Return the output of a turn's heads for all tokens, `[B, T, h, D]`."""
    q, k, v, *given = (_whole(x, sharding) for x in coming)
    cu = sharding.cu_seqlens
    if cu is None:
        return attend(q, k, v, None, None, *given)
    return attend(q[0], k[0], v[0], cu, cu, *(x[0] for x in given))[None]


def _whole(got_NSBhD: Tensor, sharding: Sharding) -> Tensor:
    """Return all tokens `[B, T, h, D]`; without padding a view, and so is its gradient."""
    whole_TBhD = sharding.in_order(got_NSBhD.flatten(0, 1))
    return (whole_TBhD[: sharding.tokens] if sharding.padding else whole_TBhD).transpose(0, 1)


def _by_rank(out_BThD: Tensor, sharding: Sharding) -> Tensor:
    """Return the output by the ranks that hold its tokens, `[N, S, B, h, D]`; contiguous shards are a view."""
    whole_TBhD = out_BThD.transpose(0, 1)
    if sharding.padding:
        whole_TBhD = torch.nn.functional.pad(whole_TBhD, (0, 0, 0, 0, 0, 0, 0, sharding.padding))
    by_rank_TBhD = sharding.by_rank(whole_TBhD)
    return by_rank_TBhD.view(sharding.ranks, sharding.local_tokens, *by_rank_TBhD.shape[1:])
