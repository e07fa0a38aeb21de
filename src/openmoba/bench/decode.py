"""A decoding step over a resident cache, and the prefill of a long prompt in chunks: `openmoba bench decode`.

Rows have the columns of the attention benchmark (`bench.table`); `passes` says what was timed:

    "decode"          one query token per sequence after `tokens` cached ones, replayed from a CUDA graph
    "decode, eager"   the same, launched from Python
    "prefill chunk"   the last `chunk` queries of `tokens`, whose keys and values are in the cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from openmoba.bench.attention import Session
from openmoba.bench.machine import attempted
from openmoba.bench.rows import read_rows
from openmoba.bench.table import Row, compared
from openmoba.bench.timing import Work, measure, replayed
from openmoba.ops.api import moba_attention
from openmoba.ops.centroids import new_centroids
from openmoba.ops.decode import moba_decode
from openmoba.ops.pages import complete_pages

# B batch, T query tokens, S cache slots, H query heads, K key/value heads, D head width, P pages

GRAPH, EAGER, CHUNK = "decode", "decode, eager", "prefill chunk"
SETTINGS = ((128, 8), (512, 3))

DENSE = {
    "sdpa_flash": (SDPBackend.FLASH_ATTENTION, False),
    "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, False),
    "sdpa_flash_grouped": (SDPBackend.FLASH_ATTENTION, True),
    "sdpa_cudnn_grouped": (SDPBackend.CUDNN_ATTENTION, True),
    "sdpa_efficient_grouped": (SDPBackend.EFFICIENT_ATTENTION, True),
}
"""Name -> backend, and whether a group's heads are passed as query tokens of their key head: the keys are then read
once per group, which `enable_gqa` leaves to the backend."""


@dataclass(frozen=True)
class Shape:
    """A cache of `batch` sequences of `tokens`."""

    tokens: int
    batch: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def row(self, contender: str, passes: str, settings: tuple[int, int] | None) -> Row:
        """Begin a row; `settings` are MoBA's block size and top-k, None for dense attention."""
        block_size, top_k = settings or (None, None)
        routing = None if settings is None else "random"
        return Row(contender, passes, block_size=block_size, top_k=top_k, routing=routing, **vars(self))


class Cache:
    """Random keys and values `[B, S, K, D]`, head-major in memory as transformers keeps them, and one query each."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(heads: int, tokens: int) -> Tensor:
            size = (shape.batch, heads, tokens, shape.head_dim)
            x = torch.empty(size, dtype=getattr(torch, shape.dtype), device=device)
            return x.normal_(generator=generator).transpose(1, 2)

        self.q = randn(shape.heads, 1)
        self.k, self.v = randn(shape.kv_heads, shape.tokens), randn(shape.kv_heads, shape.tokens)
        self.lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)

    def moba(self, block_size: int, top_k: int) -> Callable[[], Tensor]:
        """Make a step of MoBA; the pages are completed here, once."""
        slots = self.k.shape[1]
        centroids = new_centroids(self.k, slots, block_size)
        complete_pages(centroids, self.k, self.lengths, None, slots, block_size)
        caches = (self.k, self.v, centroids, self.lengths)
        return lambda: moba_decode(self.q, *caches, block_size=block_size, top_k=top_k)

    def dense(self, backend: SDPBackend, grouped: bool) -> Callable[[], Tensor]:
        """Make a step of attention to everything."""
        k_BKSD, v_BKSD = self.k.transpose(1, 2), self.v.transpose(1, 2)
        q_BHTD = self.q.transpose(1, 2)
        if grouped:
            q_BHTD = q_BHTD.reshape(*k_BKSD.shape[:2], -1, q_BHTD.shape[-1])

        def step() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, enable_gqa=not grouped)

        return step


Build = Callable[[Cache, Row], Callable[[], Tensor]]
"""Makes the call to time, which may fail, for a row over a cache."""


def decode_tasks(session: Session, shape: Shape) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield what to measure over one cache, from a graph and eager, dense attention first (`machine.fill`)."""
    passes = (GRAPH, EAGER) if session.device.type == "cuda" else (EAGER,)
    dense = [shape.row(name, kind, None) for kind in passes for name in DENSE]
    sparse = [shape.row("moba", kind, settings) for kind in passes for settings in SETTINGS]
    return cache_tasks(session, shape, ((row, _step) for row in dense + sparse))


def prefill_tasks(session: Session, shape: Shape, chunk: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield what to measure of a prompt, per setting of MoBA and chunk (`machine.fill`)."""
    ends = range(chunk, shape.tokens + 1, chunk)
    rows = (replace(shape, tokens=end).row("moba", CHUNK, settings) for settings in SETTINGS for end in ends)
    return cache_tasks(session, shape, ((row, partial(_chunk, chunk)) for row in rows))


def cache_tasks(
    session: Session, shape: Shape, cases: Iterable[tuple[Row, Build]]
) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield rows, and the calls that measure them over one cache.

    The first call makes the cache, and its memory is given back once all rows have been taken.
    """
    made: list[Cache] = []

    def measured(build: Build, row: Row) -> Row:
        if not made:
            made.append(Cache(shape, session.device))
        found = measure(Work(build(made[0], row)), session.device)
        return compared(replace(row, **vars(found)), session.rows)

    def task(build: Build, row: Row) -> Row:
        row = attempted(row, partial(measured, build))
        session.tidy()
        return row

    for row, build in cases:
        asked = replace(row, **session.machine)
        yield asked, partial(task, build, asked)
    made.clear()
    session.tidy()


def told(row: Row) -> str:
    """Say what was measured."""
    case = f"{row.passes:<14} {row.contender:<22} {row.block_size or '':>4} B={row.batch} T={row.tokens}"
    return f"{case}: {row.error or f'{row.p50_ms:.4f} ms'}"


def _step(cache: Cache, row: Row) -> Callable[[], Tensor]:
    if row.block_size is None or row.top_k is None:
        step = cache.dense(*DENSE[row.contender])
    else:
        step = cache.moba(row.block_size, row.top_k)
    return replayed(step) if row.passes == GRAPH else step


def _chunk(chunk: int, cache: Cache, row: Row) -> Callable[[], Tensor]:
    k, v = cache.k[:, : row.tokens], cache.v[:, : row.tokens]
    q = torch.randn(1, chunk, row.heads, row.head_dim, dtype=k.dtype, device=k.device)
    block_size, top_k = row.block_size, row.top_k
    assert block_size is not None
    assert top_k is not None
    return lambda: moba_attention(q, k, v, block_size=block_size, top_k=top_k)


def check_chunk(chunk: int, out: Path) -> None:
    """Raise ValueError unless the chunks in `out`, the first of which ends after one chunk, are of this size."""
    ends = [row.tokens for row in read_rows(out, Row) if row.passes == CHUNK]
    if ends and min(ends) != chunk:
        raise ValueError(
            f"{out} holds chunks of {min(ends)} tokens, got chunk={chunk}; write other chunks to another file (--out)"
        )
