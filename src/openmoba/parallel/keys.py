"""Attention by keys: ranks keep their queries and gather the keys and values of all, some heads at a time.

While one turn computes, the keys and values of the next are under way, and no more than two turns' are held. The
backward pass gathers them again, and sums their gradients over the ranks while the next turn computes.

A shard's queries are the last of the keys up to its end, which is how `openmoba.moba_attention` takes them (Tq < Tk);
the two chunks of a head-tail shard are two calls. Blocks are chosen among all keys, so the choice is one device's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from openmoba.ops.eager import eager
from openmoba.parallel.collectives import Waiting, gather, sum_parts
from openmoba.parallel.copies import copy_into
from openmoba.parallel.cost import heads_per_turn
from openmoba.parallel.heads import Attend
from openmoba.parallel.sharding import Sharding

# B batch, T tokens of the whole, S of a shard, H heads, K key/value heads of a turn, D head width


@eager("compilers do not trace transfers")
def attend_by_keys(
    attend: Attend, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, sharding: Sharding, lists: Tensor | None = None
) -> Tensor:
    """Return attention over the whole sequence, `[B, S, H, D]`, of this rank's tokens; arguments as by heads."""
    out: Tensor = _ByKeys.apply(attend, sharding, lists, q_BSHD, k_BSHD, v_BSHD)  # type: ignore[no-untyped-call]
    return out


class _ByKeys(torch.autograd.Function):
    """All turns. Each call in them has a graph of its own, whose saved tensors are saved here.

    So whoever replaces saved tensors, as checkpointing does, gets them, and gathered keys and values are not saved.
    """

    @staticmethod
    def forward(
        ctx: Any, attend: Attend, sharding: Sharding, lists: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ctx.sharding, ctx.saved, ctx.calls = sharding, _Saved(), []
        differentiate = any(ctx.needs_input_grad)
        out = _covered_like(q, sharding)
        for turn in _turns(q.shape[2], k, v, sharding):
            ctx.saved.gathered = turn.kv_TB2KD
            for piece in _pieces(sharding):
                inputs = q[:, piece.local, turn.heads], *turn.keys_until(piece.end)
                given = turn.lists(lists, k, piece)
                if differentiate:
                    with torch.enable_grad(), ctx.saved.hooks():
                        roots = _roots(*inputs)
                        result = piece.attend(attend, sharding, *roots, *given)
                    ctx.calls.append(_Call(*map(get_gradient_edge, (*roots, result))))
                else:
                    result = piece.attend(attend, sharding, *inputs, *given)
                copy_into(out[:, piece.local, turn.heads], result.detach())
        ctx.save_for_backward(k, v, *ctx.saved.take())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        sharding: Sharding = ctx.sharding
        k, v, *ctx.saved.tensors = ctx.saved_tensors
        dq, dk, dv = _covered_like(d_out, sharding), torch.empty_like(k), torch.empty_like(v)
        calls, under_way = iter(ctx.calls), _Sums(dk, dv)
        for turn in _turns(d_out.shape[2], k, v, sharding):
            ctx.saved.gathered = turn.kv_TB2KD
            padded = (sharding.ranks * sharding.local_tokens, *turn.kv_TB2KD.shape[1:])
            dkv_TB2KD, written = turn.kv_TB2KD.new_empty(padded), 0
            for piece in _pieces(sharding):
                call = next(calls)
                gradient = d_out[:, piece.local, turn.heads]
                inner = torch.autograd.grad(call.out, [call.q, call.k, call.v], gradient, retain_graph=True)
                copy_into(dq[:, piece.local, turn.heads], inner[0])
                for i, x in enumerate(inner[1:]):
                    its, x_TBKD = dkv_TB2KD[: piece.end, :, i], x.transpose(0, 1)
                    if written:
                        its.add_(x_TBKD)
                    else:
                        copy_into(its, x_TBKD)
                written = max(written, piece.end)
            dkv_TB2KD[written:] = 0
            under_way.add(turn.kv_heads, sum_parts(sharding.by_rank(dkv_TB2KD), sharding.group))
        under_way.finish()
        ctx.saved.take()
        return None, None, None, dq, dk, dv


class _Turn(NamedTuple):
    """Some key/value heads, and the query heads that share them, with the keys and values of the whole."""

    kv_heads: slice
    heads: slice
    kv_TB2KD: Tensor

    def keys_until(self, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values `[B, end, K, D]` of the first tokens."""
        k_BTKD, v_BTKD = self.kv_TB2KD[:end].transpose(0, 1).unbind(2)
        return k_BTKD, v_BTKD

    def lists(self, lists: Tensor | None, k_BSHD: Tensor, piece: _Piece) -> tuple[Tensor, ...]:
        """Return the lists of a piece's queries, if there are any: per key/value head, or per query head."""
        if lists is None:
            return ()
        shared = lists.shape[2] == k_BSHD.shape[2]
        return (lists[:, piece.local, self.kv_heads if shared else self.heads],)


def _turns(heads: int, k_BSHD: Tensor, v_BSHD: Tensor, sharding: Sharding) -> Iterator[_Turn]:
    """Yield each turn when its keys and values are there, while those of the next are on their way."""
    batch, shard, kv_heads, width = k_BSHD.shape
    step, group = heads_per_turn(kv_heads, 2 * k_BSHD.nbytes // kv_heads * sharding.ranks), heads // kv_heads
    parts = [slice(start, start + step) for start in range(0, kv_heads, step)]

    def start(part: slice) -> Waiting:
        kv_SB2KD = k_BSHD.new_empty(shard, batch, 2, step, width)
        for i, x_BSHD in enumerate((k_BSHD, v_BSHD)):
            copy_into(kv_SB2KD[:, :, i], x_BSHD[:, :, part].transpose(0, 1))
        return gather(kv_SB2KD, sharding.group)

    coming = start(parts[0])
    for i, part in enumerate(parts):
        kv_TB2KD = sharding.in_order(coming())[: sharding.tokens]
        if i + 1 < len(parts):
            coming = start(parts[i + 1])
        yield _Turn(part, slice(part.start * group, part.stop * group), kv_TB2KD)


class _Piece(NamedTuple):
    """One chunk of this rank's queries: where they lie in the shard, and `[start, end)` in the whole."""

    local: slice
    start: int
    end: int

    def attend(self, attend: Attend, sharding: Sharding, q: Tensor, k: Tensor, v: Tensor, *lists: Tensor) -> Tensor:
        """Attend with these queries, within the sequences that are among them."""
        if sharding.cu_seqlens is None:
            return attend(q, k, v, None, None, *lists)
        cu_k = sharding.cu_seqlens.clamp(max=self.end)
        cu_q = (cu_k - self.start).clamp(min=0)  # none of a sequence that ends before them
        return attend(q[0], k[0], v[0], cu_q, cu_k, *(x[0] for x in lists))[None]


def _pieces(sharding: Sharding) -> Iterator[_Piece]:
    """Yield the chunks of this rank that hold tokens, not padding alone; the last of the sequence first."""
    for i, (start, end) in reversed(list(enumerate(sharding.stretches))):
        if end > start:
            first = i * sharding.chunk
            yield _Piece(slice(first, first + end - start), start, end)


def _covered_like(x: Tensor, sharding: Sharding) -> Tensor:
    """Return room for what pieces write, zero where they leave padding."""
    return torch.zeros_like(x) if sharding.padding else torch.empty_like(x)


class _Call(NamedTuple):
    """What a call leaves for the backward pass: the ends of its graph, which hold no tensors."""

    q: GradientEdge
    k: GradientEdge
    v: GradientEdge
    out: GradientEdge


class _Root(torch.autograd.Function):
    """The beginning of a graph; unlike a leaf it does not hold its tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _roots(*tensors: Tensor) -> tuple[Tensor, ...]:
    differentiable = torch.empty(0, requires_grad=True)
    return tuple(_Root.apply(x.detach(), differentiable) for x in tensors)  # type: ignore[no-untyped-call]


class _Saved:
    """What the graphs of the calls save: tensors by number, gathered keys and values by where they lie in them.

    Attributes:
        tensors: the tensors.
        gathered: keys and values of the turn at hand.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.gathered: Tensor | None = None

    def hooks(self) -> saved_tensors_hooks:
        """Return a context whose graphs save here."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def take(self) -> list[Tensor]:
        """Give all tensors away."""
        tensors, self.tensors, self.gathered = self.tensors, [], None
        return tensors

    def _pack(self, x: Tensor) -> Any:
        assert self.gathered is not None
        if x.untyped_storage().data_ptr() == self.gathered.untyped_storage().data_ptr():
            return x.size(), x.stride(), x.storage_offset()
        self.tensors.append(x.detach())
        return len(self.tensors) - 1

    def _unpack(self, packed: Any) -> Tensor:
        assert self.gathered is not None
        return self.tensors[packed] if isinstance(packed, int) else self.gathered.as_strided(*packed)


class _Sums:
    """Gradients of keys and values on their way, those of one turn at a time."""

    def __init__(self, dk_BSHD: Tensor, dv_BSHD: Tensor) -> None:
        self.dk_BSHD, self.dv_BSHD = dk_BSHD, dv_BSHD
        self.under_way: tuple[slice, Waiting] | None = None

    def add(self, kv_heads: slice, waiting: Waiting) -> None:
        """Take up those of another turn, once those before have arrived."""
        self.finish()
        self.under_way = kv_heads, waiting

    def finish(self) -> None:
        """Wait for those under way."""
        if self.under_way is None:
            return
        kv_heads, waiting = self.under_way
        for gradient, part in zip((self.dk_BSHD, self.dv_BSHD), waiting().transpose(0, 1).unbind(2), strict=True):
            gradient[:, :, kv_heads] = part
        self.under_way = None
