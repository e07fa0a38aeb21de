"""How one sequence lies over the processes of a group.

A sequence is cut into chunks of equal length, padded at its end to fill the last one; padding comes after every real
token, so causal attention never sees it. Three ranks, chunks numbered from the start of the sequence:

    contiguous    rank 0: [0]       rank 1: [1]       rank 2: [2]
    head-tail     rank 0: [0, 5]    rank 1: [1, 4]    rank 2: [2, 3]

Of contiguous shards the last has most to read. A rank's two chunks of a head-tail shard lie as far from the start as
from the end, so all ranks have the same to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from openmoba.ops.checks import check_boundary_values, check_tensors
from openmoba.parallel.collectives import gather, group_of
from openmoba.parallel.cost import WAYS, choose_way

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Layout = Literal["contiguous", "head-tail"]
LAYOUTS = ("contiguous", "head-tail")


@dataclass(frozen=True)
class Sharding:
    """One sequence, or several packed behind each other, over the ranks of a process group.

    Attributes:
        tokens: length T of the whole.
        rank: of this process within the group.
        ranks: processes of the group.
        group: the process group.
        layout: "contiguous" or "head-tail", see the head of this file.
        way: how attention crosses the ranks: "heads", "keys", or "auto" for what `openmoba.parallel.cost.choose_way`
            says of the heads at hand.
        cu_seqlens: of packed sequences, where each starts in the whole, int32 `[sequences + 1]`; the same on every
            rank.
    """

    tokens: int
    rank: int
    ranks: int
    group: ProcessGroup
    layout: str = "contiguous"
    way: str = "auto"
    cu_seqlens: Tensor | None = field(default=None, compare=False)

    @classmethod
    def over(
        cls,
        group: Any,
        tokens: int,
        *,
        layout: str = "contiguous",
        way: str = "auto",
        cu_seqlens: Tensor | None = None,
    ) -> Sharding:
        """Lay a whole of `tokens` tokens out over a group.

        Args:
            group: a `ProcessGroup`, a `DeviceMesh` of one dimension, or None for all processes.

        Raises:
            ValueError: there is no process group, an unknown layout or way, no token, or
                boundaries that are not of so many tokens.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"a sharded sequence needs at least 1 token, got {tokens!r}")
        if cu_seqlens is not None:
            check_tensors(cu_seqlens=cu_seqlens)
            if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
                got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
                raise ValueError(f"cu_seqlens must be int32 of shape [sequences + 1], got {got}; use .int()")
            if cu_seqlens.device.type == "cpu":  # on a rank that has none of the wrong ones nothing would show
                check_boundary_values(cu_seqlens, cu_seqlens, tokens, tokens)
        group, rank, ranks = group_of(group)
        return cls(tokens, rank, ranks, group, layout, way, cu_seqlens)

    @classmethod
    def balanced(
        cls, group: Any, tokens: int, heads: int, kv_heads: int, *, cu_seqlens: Tensor | None = None
    ) -> Sharding:
        """Lay a whole out for attention of these heads: head-tail by keys, contiguous by heads. Arguments as in `over`.

        Raises:
            ValueError: as `over`.
        """
        sharding = cls.over(group, tokens, cu_seqlens=cu_seqlens)
        found = sharding.resolved(heads, kv_heads)
        return replace(sharding, way=found, layout="contiguous" if found == "heads" else "head-tail")

    @property
    def per_rank(self) -> int:
        """Chunks that a rank holds."""
        return 1 if self.layout == "contiguous" else 2

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return -(-self.tokens // (self.ranks * self.per_rank))

    @property
    def local_tokens(self) -> int:
        """Tokens of a shard, padding included."""
        return self.chunk * self.per_rank

    @property
    def padding(self) -> int:
        """Tokens that fill up the last chunks."""
        return self.ranks * self.local_tokens - self.tokens

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks of all ranks, rank by rank: what an all-gather puts behind each other."""
        last = 2 * self.ranks - 1
        return tuple(c for r in range(self.ranks) for c in ((r,) if self.per_rank == 1 else (r, last - r)))

    @property
    def own_chunks(self) -> tuple[int, ...]:
        """The chunks that this rank holds."""
        return self.chunks[self.rank * self.per_rank : (self.rank + 1) * self.per_rank]

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """Where this rank's chunks begin and end in the whole, padding left out: [start, end)."""
        bounds = ((c * self.chunk, (c + 1) * self.chunk) for c in self.own_chunks)
        return tuple((min(start, self.tokens), min(end, self.tokens)) for start, end in bounds)

    @property
    def positions(self) -> Tensor:
        """Where each token of this rank's shard lies in the whole, int64; from `tokens` on it is padding."""
        return torch.cat([torch.arange(c * self.chunk, (c + 1) * self.chunk) for c in self.own_chunks])

    def resolved(self, heads: int, kv_heads: int) -> str:
        """Return the way that attention of these heads takes: "heads" or "keys".

        Raises:
            ValueError: "heads" is asked for, and the ranks cannot share the heads evenly.
        """
        if self.way == "auto":
            return choose_way(heads, kv_heads, self.ranks)
        if self.way == "heads" and heads % self.ranks:
            raise ValueError(
                f"way='heads' gives each of {self.ranks} ranks as many query heads, and there are {heads}; "
                "use way='keys', or a number of ranks that divides them"
            )
        return self.way

    def check_shard(self, name: str, tokens: int) -> None:
        """Raise ValueError unless a tensor of this name holds a shard: a wrong one would leave the others waiting."""
        if tokens != self.local_tokens:
            raise ValueError(
                f"{name} holds {tokens} tokens, but a shard of {self.tokens} tokens over {self.ranks} ranks holds "
                f"{self.local_tokens}; cut it with Sharding.shard"
            )

    def shard(self, x: Tensor, dim: int = 1, padding: float = 0) -> Tensor:
        """Cut this rank's part out of the whole `x`, whose dimension `dim` is the tokens; `padding` fills it up."""
        if x.shape[dim] != self.tokens:
            raise ValueError(f"dimension {dim} holds {x.shape[dim]} tokens, but the sharding is of {self.tokens}")
        parts = []
        for start, end in self.stretches:
            missing = self.chunk - (end - start)
            part = x.narrow(dim, start, end - start)
            shape = [*x.shape[:dim], missing, *x.shape[dim + 1 :]]
            parts.append(torch.cat([part, x.new_full(shape, padding)], dim) if missing else part)
        return torch.cat(parts, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """Put the parts of all ranks together again, without padding; every rank gets the whole. No gradient."""
        gathered = gather(x.detach().movedim(dim, 0).contiguous(), self.group)
        return self.in_order(gathered())[: self.tokens].movedim(0, dim)

    def in_order(self, x: Tensor) -> Tensor:
        """Bring what all ranks hold, rank by rank along dimension 0, into the order of the sequence.

        Args:
            x: shards, or as much of every chunk.
        """
        return self._taken(x, sorted(range(len(self.chunks)), key=self.chunks.__getitem__))

    def by_rank(self, x: Tensor) -> Tensor:
        """Bring a padded whole along dimension 0 into the order of ranks; the inverse of `in_order`."""
        return self._taken(x, self.chunks)

    def _taken(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Take chunks in this order; by slices, since an index would have to be copied to the device each time."""
        if self.per_rank == 1:
            return x
        parts = torch.split(x, x.shape[0] // len(self.chunks))
        return torch.cat([parts[i] for i in order])
