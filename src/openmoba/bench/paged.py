"""A cache in pages beside a contiguous one, decoding and prefilling a chunk: `openmoba bench paged`.

Rows have the columns of the attention benchmark (`bench.table`); `passes` says what was timed: "decode", replayed from
a CUDA graph, and "chunk of 8K" with a contiguous cache, and with ", pages of 128" behind over a block table. Pages lie
as vLLM has them, in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from openmoba.bench import cases
from openmoba.bench.attention import Session
from openmoba.bench.decode import GRAPH, Cache, Shape, cache_tasks
from openmoba.bench.rows import length_name, markdown_table
from openmoba.bench.table import Row
from openmoba.bench.timing import replayed
from openmoba.ops.api import moba_attention
from openmoba.ops.paged import complete_paged, moba_paged, new_paged_centroids

# Z pages, P tokens of a page, B sequences, M pages of a sequence, K key/value heads, D head width


class PagedCache:
    """The keys and values of a `Cache` once more, in pages, and what `moba_paged` takes beside queries."""

    def __init__(self, cache: Cache, page_size: int, block_size: int) -> None:
        batch, tokens, heads, width = cache.k.shape
        pages = tokens // page_size
        device, generator = cache.k.device, torch.Generator(cache.k.device).manual_seed(1)
        order = torch.randperm(batch * pages, generator=generator, device=device)
        pool = torch.empty(batch * pages, heads, page_size, 2 * width, dtype=cache.k.dtype, device=device)
        self.k, self.v = pool[..., :width].transpose(1, 2), pool[..., width:].transpose(1, 2)
        for row, own in enumerate(order.view(batch, pages)):
            for x, of in ((self.k, cache.k), (self.v, cache.v)):
                x[own] = of[row].reshape(pages, page_size, heads, width)
        self.table = order.view(batch, pages).int()
        self.lengths, self.block_size = cache.lengths, block_size
        self.centroids = new_paged_centroids(self.k, block_size)
        complete_paged(self.centroids, self.k, self.table, self.lengths, self._borders(tokens), block_size)

    def _borders(self, new: int) -> Tensor:
        """Return boundaries of sequences that have so many new tokens each."""
        return torch.arange(len(self.table) + 1, dtype=torch.int32, device=self.table.device) * new

    def step(self, q: Tensor, top_k: int) -> Callable[[], Tensor]:
        """Make a call for queries `[B, T, H, D]`, the last tokens of each sequence."""
        q, borders = q.flatten(0, 1), self._borders(q.shape[1])
        where = (self.table, self.lengths, borders)
        return lambda: moba_paged(q, self.k, self.v, self.centroids, *where, block_size=self.block_size, top_k=top_k)


def paged_tasks(session: Session, shape: Shape, chunk: int | None) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield what to measure per setting and cache: decoding, or the last `chunk` tokens of a prompt."""
    passes = GRAPH if chunk is None else f"chunk of {length_name(chunk)}"
    wanted = [(block_size, top_k, page) for block_size, top_k, pages in cases.PAGED for page in (None, *pages)]
    rows = (
        (
            shape.row("moba", passes if page is None else f"{passes}, pages of {page}", (block_size, top_k)),
            partial(_call, page, chunk),
        )
        for block_size, top_k, page in wanted
    )
    return cache_tasks(session, shape, rows)


def _call(page_size: int | None, chunk: int | None, cache: Cache, row: Row) -> Callable[[], Tensor]:
    """Return the call to time."""
    assert row.block_size is not None
    assert row.top_k is not None
    q = cache.q
    if chunk is not None:
        q = torch.randn(row.batch, chunk, row.heads, row.head_dim, dtype=q.dtype, device=q.device)
    if page_size is not None:
        step = PagedCache(cache, page_size, row.block_size).step(q, row.top_k)
    elif chunk is None:
        step = cache.moba(row.block_size, row.top_k)
    else:
        block_size, top_k = row.block_size, row.top_k
        return lambda: moba_attention(q, cache.k, cache.v, block_size=block_size, top_k=top_k)
    return replayed(step) if chunk is None and q.is_cuda else step


def markdown(rows: list[Row]) -> str:
    """Write a Markdown table: a line per case, and how much longer than a contiguous cache pages take."""
    lines = [("block/top-k", "tokens", "batch", "passes", "ms", "of contiguous")]
    times = {_case(row): row.p50_ms for row in rows}
    for row in rows:
        alone = times.get(_case(replace(row, passes=row.passes.partition(", pages")[0])))
        ratio = f"{row.p50_ms / alone:.2f}" if row.p50_ms and alone else "-"
        settings = f"{row.block_size}/{row.top_k}"
        time = row.error or f"{row.p50_ms:.4f}"
        lines.append((settings, length_name(row.tokens), str(row.batch), row.passes, time, ratio))
    return "\n".join(markdown_table(lines[0], lines[1:]))


def _case(row: Row) -> tuple[object, ...]:
    return row.block_size, row.top_k, row.tokens, row.batch, row.passes
