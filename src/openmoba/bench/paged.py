"""`openmoba bench paged`: a cache in pages beside a contiguous one, decoding and prefilling a chunk.

Rows have the columns of the attention benchmark (`bench.table`); `passes` says what was timed: "decode", replayed from
a CUDA graph, and "chunk of 8K" with a contiguous cache, and with ", pages of 128" behind over a block table. Pages lie
as vLLM has them, in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from openmoba.bench.attention import Session
from openmoba.bench.decode import GRAPH, Cache, Shape, cache_tasks, replayed, told
from openmoba.bench.machine import fill
from openmoba.bench.rows import length_name, markdown_table, read_rows
from openmoba.bench.table import Row
from openmoba.limits import check_count
from openmoba.ops.api import moba_attention
from openmoba.ops.paged import complete_paged, moba_paged, new_paged_centroids

# Z pages, P tokens of a page, B sequences, M pages of a sequence, K key/value heads, D head width

SETTINGS = ((128, 8, (16, 128)), (512, 3, (512,)))
"""Block size, top-k, page sizes."""


@dataclass(frozen=True)
class Paged:
    """Time MoBA over a block table beside a contiguous cache; the same command goes on where a stopped one ended."""

    lengths: tuple[int, ...] = tuple(1024 * k for k in (32, 128, 512))
    """Cached tokens per sequence."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences decoded together."""
    prefill: int = 2**19
    """Tokens of the prompt whose last chunk is prefilled; 0 leaves that out."""
    chunk: int = 2**13
    """Tokens of the chunk."""
    out: Path = Path("paged.csv")
    """CSV file that rows are added to; what it holds for this commit and device is not measured again."""
    commit: str | None = None
    """Recorded instead of the checkout's, for a copy of its files; by default what git says."""

    def __post_init__(self) -> None:
        for tokens in self.lengths:
            check_count("--lengths", tokens, 1)
            check_pages("--lengths", tokens)
        for batch in self.batches:
            check_count("--batches", batch, 1)
        check_count("--prefill", self.prefill, 0)
        check_pages("--prefill", self.prefill)
        check_count("--chunk", self.chunk, 1)
        if self.prefill and self.chunk > self.prefill:
            raise ValueError(f"--chunk must be part of the --prefill of {self.prefill} tokens, got {self.chunk}")

    def run(self) -> None:
        """Measure, and print a table."""
        if not torch.cuda.is_available():
            raise ValueError("openmoba bench paged needs a GPU")
        session = Session(torch.device("cuda"), self.commit, read_rows(self.out, Row))
        cases: list[tuple[Shape, int | None]] = [(Shape(self.prefill, 1), self.chunk)] if self.prefill else []
        cases += [(Shape(tokens, batch), None) for tokens in self.lengths for batch in self.batches]
        tasks = chain.from_iterable(paged_tasks(session, *case) for case in cases)
        print(markdown(fill(self.out, session.rows, tasks, minutes=None, told=told)))


def check_pages(name: str, tokens: int) -> None:
    """Raise ValueError unless so many tokens fill whole pages of every size."""
    largest = max(page for *_, pages in SETTINGS for page in pages)
    if tokens % largest:
        raise ValueError(f"{name} must be a multiple of {largest} tokens, the largest page, got {tokens}")


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
    cases = [(block_size, top_k, page) for block_size, top_k, pages in SETTINGS for page in (None, *pages)]
    rows = (
        (
            shape.row("moba", passes if page is None else f"{passes}, pages of {page}", (block_size, top_k)),
            partial(_call, page, chunk),
        )
        for block_size, top_k, page in cases
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
