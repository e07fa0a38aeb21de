"""What the tests of paged caches share: a server of sequences over one pool of pages, and an fp64 oracle."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openmoba import complete_paged, moba_paged, new_paged_centroids
from openmoba.ops.arguments import KeyPages
from openmoba.ops.decode import MAX_QUERIES

NOWHERE = 2**30  # a page


class Server:
    """A pool of pages in vLLM's layout, keys and values side by side, and the sequences that it serves.

    What nobody wrote is NaN, pages and centroids alike. Behind its last page a table names one far outside of any
    memory: a kernel that looks there, and goes, crashes.
    """

    def __init__(
        self,
        page_size: int,
        block_size: int,
        dtype: torch.dtype = torch.float64,
        pages: int = 200,
        heads: int = 6,
        kv_heads: int = 3,
        width: int = 8,
        device: str = "cpu",
    ) -> None:
        self.page_size, self.block_size = page_size, block_size
        self.heads, self.kv_heads, self.width, self.device = heads, kv_heads, width, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.pool = torch.full((pages, kv_heads, page_size, 2 * width), float("nan"), dtype=dtype, device=device)
        self.k_pages, self.v_pages = (x.transpose(1, 2) for x in self.pool.split(width, 3))
        self.centroids = new_paged_centroids(self.k_pages, block_size).fill_(float("nan"))
        self.free = torch.randperm(pages, generator=self.generator, device=device).tolist()
        self.tables: list[list[int]] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def draw(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.device)
        return x.to(self.k_pages.dtype)

    def begin(self, like: int | None = None, shared: int = 0) -> int:
        """A new sequence, whose first pages are those of another one."""
        tokens = shared * self.page_size
        self.tables.append([] if like is None else self.tables[like][:shared])
        for kept in (self.keys, self.values):
            kept.append(self.draw(0, self.kv_heads, self.width) if like is None else kept[like][:tokens])
        return len(self.tables) - 1

    def write(self, sequence: int, new: int) -> None:
        """New tokens' keys and values, to pages that are taken as they are needed."""
        table, tokens = self.tables[sequence], len(self.keys[sequence])
        while len(table) * self.page_size < tokens + new:
            table.append(self.free.pop())
        token = torch.arange(tokens, tokens + new, device=self.device)
        page = torch.tensor(table, dtype=torch.int64, device=self.device)[token // self.page_size]
        for kept, pages in ((self.keys, self.k_pages), (self.values, self.v_pages)):
            states = self.draw(new, self.kv_heads, self.width)
            pages[page, token % self.page_size] = states
            kept[sequence] = torch.cat([kept[sequence], states])

    def end(self, sequence: int) -> None:
        """Give a sequence's pages back; what they hold stays there."""
        self.free += self.tables[sequence]

    def call(self, news: dict[int, int]) -> dict[str, Any]:
        """Write these numbers of new tokens; what `moba_paged` takes for this batch."""
        for sequence, new in news.items():
            self.write(sequence, new)
        longest = max(len(self.tables[sequence]) for sequence in news)
        table = [self.tables[sequence] + [NOWHERE] * (longest - len(self.tables[sequence]) + 1) for sequence in news]
        lengths = [len(self.keys[sequence]) for sequence in news]
        ends = torch.tensor([0, *news.values()]).cumsum(0)
        return {
            "q": self.draw(int(ends[-1]), self.heads, self.width),
            "k_pages": self.k_pages,
            "v_pages": self.v_pages,
            "centroids": self.centroids,
            "block_table": torch.tensor(table, dtype=torch.int32, device=self.device),
            "lengths": torch.tensor(lengths, dtype=torch.int32, device=self.device),
            "cu_seqlens_q": ends.int().to(self.device),
            "block_size": self.block_size,
        }

    def complete(self, call: dict[str, Any]) -> None:
        """Bring the centroids up to date for a call."""
        complete_paged(*of_upkeep(call))


def of_upkeep(call: dict[str, Any]) -> KeyPages:
    """What `complete_paged` takes of what `moba_paged` takes, in its order."""
    names = ("centroids", "k_pages", "block_table", "lengths", "cu_seqlens_q", "block_size")
    return KeyPages(*(call[name] for name in names))


def expected(call: dict[str, Any], top_k: int) -> Tensor:
    """The result in fp64 by torch operations, chosen by the stored centroids: a few queries at a time."""
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in call.items()}
    starts, ends = call["cu_seqlens_q"].tolist(), call["lengths"].tolist()
    rows, lengths, borders = [], [], [0]
    for row, (start, end) in enumerate(pairwise(starts)):
        for first in range(start, end, MAX_QUERIES):
            last = min(first + MAX_QUERIES, end)
            rows.append(row)
            lengths.append(ends[row] - (end - last))
            borders.append(last)
    device = call["lengths"].device
    wide["q"] = wide["q"][: starts[-1]]
    wide["block_table"] = call["block_table"][rows]
    wide["lengths"], wide["cu_seqlens_q"] = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, borders)
    )
    return moba_paged(**wide, top_k=top_k, impl="reference")
