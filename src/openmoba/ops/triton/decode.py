"""Decode: a few queries per row over a cache with centroids, in two launches that wait for nothing.

    score    s[r, p] = <q_r, c_p> for the blocks p before the last query's own, a tile of them per program
    attend   a program finds its portion of the blocks that a query reads, and attends to them; the last program of a
             query to finish adds up the portions:  o = sum_i o_i exp(lse_i - lse), lse = log sum_i exp lse_i

Source: MoBA technical report, arXiv 2502.13189, equations 2 to 6. Portions are as small as it takes to keep all
multiprocessors busy: some of the `top_k` blocks, or a piece of one. Every portion repeats the choice up to its own
last block, which costs less than a launch of its own. Portions are added in a fixed order, whichever program does it,
so equal inputs give equal bits. All sizes that change while decoding are read on the device.

The kernels are in `decode_kernels`, which says what a query row r is.

The rows of a cache have equally many query tokens, or the queries of all are packed and keys lie in pages that a block
table names (`openmoba.ops.paged`). Packed query tokens are as many rows of one query each, whose sequence is looked up.

One allocation holds, in this order: for each query row the number of programs that have finished (int32), its scores,
its portions' outputs, and their log-sum-exps. `score` zeroes the numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmoba.ops.arguments import KeyCache, KeyPages
from openmoba.ops.triton import decode_kernels
from openmoba.ops.triton.arguments import Packed, Rows
from openmoba.ops.triton.geometry import cdiv, kernel_width, power_of_two, strides
from openmoba.ops.triton.host.device import most_registers, multiprocessors, nvidia_capability
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.pages import complete_pages

__all__ = ["complete_pages", "decode"]

_BLOCKS_PER_TILE = 64
_MOST_ROWS = 64  # query rows per tile of the scores
_LANES = (1024, 4096)  # blocks whose scores a program keeps in registers; of more it looks at 1024 at once
_MERGED_AT_ONCE = 16
_MOST_PAGES = 64  # looked up at once, of a block that lies in several
_TILE_BYTES = 2**13  # keys of one tile: small enough for four programs per multiprocessor
_TILES_IN_FLIGHT = 2
_PROGRAMS_PER_MULTIPROCESSOR = 4


def decode(q: Tensor, cache: KeyCache, v_cache: Tensor, top_k: int, scale: float) -> Tensor:
    """Do what `openmoba.ops.decode.moba_decode` says, checked; the last dimension of all tensors is contiguous."""
    centroids, keys, _, starts, block_size = cache
    block_size = min(block_size, keys.shape[1])  # a larger one holds no more keys
    launches = _launches(
        *q.shape, *centroids.shape[1:3], block_size, top_k, scale, q.dtype, q.device,
        strides(q), strides(keys), strides(v_cache), strides(centroids), None,
    )  # fmt: skip
    return _run(launches, q, keys, v_cache, cache, starts)


def packed_launches(q: Tensor, cache: KeyPages, v_pages: Tensor, top_k: int, scale: float) -> Launches:
    """Return the launches for packed queries `[N, H, D]` over the pages that a block table names."""
    centroids, k_pages, block_table, _, _, block_size = cache
    (tokens, heads, width), (_, page_size, kv_heads, _) = q.shape, k_pages.shape
    sequences, pages = block_table.shape
    packed, room = Packed(TENSOR, block_table.stride(0), page_size, TENSOR, sequences), pages * page_size
    return _launches(
        tokens, 1, heads, width, room // block_size, kv_heads, min(block_size, room), top_k, scale, q.dtype, q.device,
        (q.stride(0), *q.stride()[:2]), strides(k_pages), strides(v_pages), strides(centroids), packed,
    )  # fmt: skip


def run_packed(launches: Launches, q: Tensor, cache: KeyPages, v_pages: Tensor) -> Tensor:
    """Attend as these launches were made to."""
    return _run(launches, q, cache.k_pages, v_pages, cache, None, cache.block_table, cache.cu_q)


def _run(
    launches: Launches,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyCache | KeyPages,
    starts: Tensor | None,
    *packed: Tensor,
) -> Tensor:
    """Attend; of packed queries the block table and the boundaries are given too."""
    workspace = torch.empty(launches.numbers, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if launches.score is not None:
        launches.score(q, cache.centroids, workspace, cache.lengths, *packed)
    elif launches.shared:
        workspace[: launches.counters].zero_()
    launches.attend(q, k, v, workspace, out, cache.lengths, starts, *packed)
    return out


class Workspace(NamedTuple):
    """One allocation: `counters`, then per query row `padded` scores, then outputs and log-sum-exps of portions."""

    ptr: Any
    counters: int
    padded: int


class Launches(NamedTuple):
    """What does not depend on the tensors' contents.

    Attributes:
        numbers: size of the workspace.
        counters: how many of them are counters.
        score: None where there is nothing to choose.
        shared: whether several programs attend for one query row.
    """

    numbers: int
    counters: int
    score: Launch | None
    shared: bool
    attend: Launch


@lru_cache(maxsize=REMEMBERED)
def _launches(
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    blocks: int,
    kv_heads: int,
    block_size: int,
    top_k: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    q_strides: tuple[int, int, int],
    k_strides: tuple[int, int, int],
    v_strides: tuple[int, int, int],
    centroid_strides: tuple[int, int, int],
    packed: Packed | None,
) -> Launches:
    top_k = min(top_k, blocks + 1)
    chooses = top_k > 1
    group, rows, d = heads // kv_heads, batch * heads * tokens, kernel_width(width)
    n = keys_per_tile(block_size, d, dtype.itemsize)
    ranks, piece = portion_of(rows, block_size, top_k, n, multiprocessors(device))
    pieces = cdiv(block_size, piece)
    portions = cdiv(top_k, ranks) * pieces
    # Multiples of 16 keep addresses aligned.
    counters, padded = cdiv(rows, 16) * 16, cdiv(blocks, 16) * 16 if chooses else 0
    partials = portions * (width + 1) if portions > 1 else 0
    split = 0 if packed is None or packed.page_size >= block_size else packed.page_size
    overlap = chooses and overlaps(device)
    workspace, queries = Workspace(TENSOR, counters, padded), Rows.of(q_strides)
    options = {"GROUP": group, "WIDTH": width, "D": d, "OVERLAPS": overlap, "num_warps": 4}
    scored, m, row_tiles = scored_at_once(batch, tokens, group, packed)
    score = Launch(
        decode_kernels.score,
        (cdiv(blocks, _BLOCKS_PER_TILE), kv_heads * cdiv(scored * group, m), row_tiles),
        (queries, Rows.of(centroid_strides), workspace, TENSOR, packed, blocks, block_size),
        options | {"TOKENS": scored, "M": m, "N": _BLOCKS_PER_TILE, "W": min(d, 64) if dtype == torch.float32 else d},
    )
    tensors = (queries, Rows.of(k_strides), Rows.of(v_strides), workspace, TENSOR, TENSOR, TENSOR, packed)
    lanes = next((lanes for lanes in _LANES if lanes >= blocks), _LANES[0])
    looked_up = dict(zip(("PAGES", "TURNS"), pages_of(min(piece, block_size), split), strict=True))
    attend = Launch(
        decode_kernels.attend,
        (portions, heads * tokens, batch),
        (*tensors, blocks, block_size, top_k, ranks, pieces, piece, scale),
        options
        | {"TOKENS": tokens, "SPLIT": split, "CHOOSES": chooses, "SHARED": portions > 1}
        | {"L": lanes, "IN_REGISTERS": blocks <= _LANES[-1], **looked_up}
        | {"N": n, "C": _MERGED_AT_ONCE, "STAGES": _TILES_IN_FLIGHT + 1}
        | most_registers(128)
        | ({"launch_pdl": True} if overlap else {}),
    )
    return Launches(counters + rows * (padded + partials), counters, score if chooses else None, portions > 1, attend)


def scored_at_once(batch: int, tokens: int, group: int, packed: Packed | None) -> tuple[int, int, int]:
    """Return how many query tokens are scored together, the rows of their tiles, and how often there are as many."""
    together = tokens if packed is None else cdiv(batch, packed.sequences)
    m = min(_MOST_ROWS, max(16, power_of_two(together * group)))
    if packed is None:
        return tokens, m, batch
    together = max(1, m // group)
    return together, m, batch // together + packed.sequences


def keys_per_tile(block_size: int, d: int, itemsize: int) -> int:
    """Return how many keys a program of the attention works on at once."""
    return min(64, _TILE_BYTES // (d * itemsize), max(16, power_of_two(block_size)))


def portion_of(rows: int, block_size: int, top_k: int, tile: int, multiprocessors: int) -> tuple[int, int]:
    """Return what one program attends to, of `rows` query rows in all: a number of blocks, and keys of each."""
    programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    wanted = cdiv(programs, rows)
    if wanted <= top_k:
        return top_k // wanted, block_size
    pieces = max(1, programs // rows // top_k)  # no more than run at once: a few more would take a second turn
    return 1, cdiv(cdiv(block_size, pieces), tile) * tile


def pages_of(piece: int, page_size: int) -> tuple[int, int]:
    """Return how many pages of a piece are looked up at once, and in how many turns; zeros for a page size of 0."""
    if page_size == 0:
        return 0, 0
    pages = cdiv(piece, page_size) + (piece % page_size > 0)  # a piece may begin within one
    at_once = min(power_of_two(pages), _MOST_PAGES)
    return at_once, cdiv(pages, at_once)


def overlaps(device: torch.device) -> bool:
    """Say whether a kernel can be started before the one it waits for has ended: programmatic dependent launch."""
    return nvidia_capability(device) >= (9, 0)
