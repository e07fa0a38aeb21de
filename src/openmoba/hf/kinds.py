"""The kinds of attention that a layer can be of: full attention and MoBA.

A kind computes attention within whole rows, within packed sequences and, where caches keep pages for it, for a few
tokens after a cache. Where these lie it is told, see `openmoba.hf.attention`. It does not name its layer, and kinds
with the same fields are equal: layers whose kinds are equal share their compiled graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from openmoba.hf.layout import Sequences
from openmoba.hf.pages import Pages
from openmoba.ops.api import moba_attention
from openmoba.ops.decode import moba_decode
from openmoba.ops.dense import dense_attention
from openmoba.ops.varlen import dense_sequences

# B batch, T queries, S keys, N queries of all sequences, M their keys, H query heads, Hkv key/value heads, D head width


class Kind(Protocol):
    """What every kind of attention has."""

    def reads_all(self, keys: int) -> bool:
        """Return whether every query reads all its past keys, of at most so many."""
        ...

    def rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend within rows of one whole sequence each: `[B, T, H, D]` to keys and values `[B, S, Hkv, D]`."""
        ...

    def sequences(self, q: Tensor, k: Tensor, v: Tensor, where: Sequences, scale: float) -> Tensor:
        """Attend within packed sequences: `[N, H, D]` to keys and values `[M, Hkv, D]`."""
        ...


@dataclass(frozen=True)
class Full:
    """Full causal attention."""

    def reads_all(self, keys: int) -> bool:
        """See `Kind`."""
        return True

    def rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Kind`."""
        with torch.autocast(q.device.type, enabled=False):  # sums are fp32; autocast would take 16 bits
            return dense_attention(q, k, v, scale)

    def sequences(self, q: Tensor, k: Tensor, v: Tensor, where: Sequences, scale: float) -> Tensor:
        """See `Kind`."""
        longest = k.shape[0] if where.longest is None else where.longest
        return dense_sequences(q, k, v, where.cu_q, where.cu_k, longest, scale)


@dataclass(frozen=True)
class Moba:
    """Mixture of block attention; caches keep pages for it, which `step` reads."""

    block_size: int
    top_k: int

    def reads_all(self, keys: int) -> bool:
        """See `Kind`."""
        return self.top_k * self.block_size >= keys

    def rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Kind`."""
        return moba_attention(q, k, v, block_size=self.block_size, top_k=self.top_k, scale=scale)

    def sequences(self, q: Tensor, k: Tensor, v: Tensor, where: Sequences, scale: float) -> Tensor:
        """See `Kind`."""
        size, top_k, cu_q, cu_k = self.block_size, self.top_k, where.cu_q, where.cu_k
        return moba_attention(q, k, v, block_size=size, top_k=top_k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=scale)

    def step(self, q: Tensor, k: Tensor, v: Tensor, pages: Pages, scale: float) -> Tensor:
        """Attend for up to `openmoba.ops.decode.MAX_QUERIES` tokens, which read the pages they choose; no gradient."""
        return moba_decode(q, k, v, *pages, block_size=self.block_size, top_k=self.top_k, scale=scale)
