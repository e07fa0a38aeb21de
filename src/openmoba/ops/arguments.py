"""What operations take of what belongs together: structs that Protocols, backends and checks take whole.

So a new argument is written here, and in the public verbs that take it. Torch's operations have tensors and numbers
alone: `openmoba.ops.operation` takes the structs apart for them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Blocking(NamedTuple):
    """Where sequences and their blocks begin, and how many blocks a query reads.

    Attributes:
        cu_q, cu_k: int32 `[sequences + 1]`, where each packed sequence starts in queries and keys; None for a batch.
        block_size: tokens per block.
        top_k: blocks read per query and head, the own block included.
    """

    cu_q: Tensor | None
    cu_k: Tensor | None
    block_size: int
    top_k: int


class KeyCache(NamedTuple):
    """The keys of a cache and the centroids of their pages, as `openmoba.complete_pages` describes them."""

    centroids: Tensor
    keys: Tensor
    lengths: Tensor
    starts: Tensor | None
    block_size: int


class KeyPages(NamedTuple):
    """The keys that a block table names and the centroids of their blocks, as `openmoba.moba_paged` describes them.

    `cu_q` is where each sequence's new tokens begin.
    """

    centroids: Tensor
    k_pages: Tensor
    block_table: Tensor
    lengths: Tensor
    cu_q: Tensor
    block_size: int
