"""Query->block inversion on CPU: which query rows meet which keys, as batches of equally shaped tiles.

A *part* of the call is small enough to work on at once: some key/value heads of some sequences, or of a
range of queries of one sequence (which is chunked prefill: its keys end where its queries end). Inside a part,
query rows are numbered `(head * queries + query) * group + member`, and key rows `head * keys + key`.

A *tile* reads `span` consecutive key rows for a list of query rows. Every tile row makes one
*partial* result; `partials_of_row` lists, for each query row, those that make up its result.

Suffixes: T queries, J key/value heads, G query heads per key/value head, K = top_k - 1, C partials of a query row,
N complete blocks, L tiles, R rows of a tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Partials worked on at once: what bounds the workspace.
PARTIALS_AT_ONCE = 2**17
# A range of queries is long enough for this many rows per block on average, however many blocks there are.
ROWS_PER_BLOCK = 1024
# Rows of a tile over a past block. The kernel is fastest from 768 rows on; the rest of a block's rows go into
# smaller tiles, so that few rows are padding.
TILE_ROWS = (768, 192, 64)


class Sequence(NamedTuple):
    """A sequence, or a range of its queries: where its queries and keys start, and how many there are."""

    q_start: int
    queries: int
    k_start: int
    keys: int


class Part(NamedTuple):
    """Sequences that follow one another, and a range of key/value heads, which may end behind the last one."""

    sequences: list[Sequence]
    heads: slice

    @property
    def queries(self) -> slice:
        """Query tokens of the call that belong to this part."""
        first, last = self.sequences[0], self.sequences[-1]
        return slice(first.q_start, last.q_start + last.queries)

    @property
    def keys(self) -> slice:
        """Key tokens of the call that belong to this part."""
        first, last = self.sequences[0], self.sequences[-1]
        return slice(first.k_start, last.k_start + last.keys)


class Tiles(NamedTuple):
    """Tiles of one shape.

    Attributes:
        row_LR: query rows, int64; the number of query rows stands for padding.
        rank: the column of `partials_of_row` that a tile row's partial goes to, `[L, R]` or one for all.
        key_L: first key row of each tile, int64.
        span: keys of each tile.
        causal: whether row i of a tile reads only its first i + 1 keys.
    """

    row_LR: Tensor
    rank: Tensor | int
    key_L: Tensor
    span: int
    causal: bool


class Tiling(NamedTuple):
    """Tiles in the order of their partials, and `partials_of_row` int32 `[rows, C]`, `partials` standing for none."""

    tiles: list[Tiles]
    partials_of_row: Tensor
    partials: int


def parts(sequences: Iterable[Sequence], kv_heads: int, partials_per_query: int, block_size: int) -> Iterator[Part]:
    """Cut a call into parts of about PARTIALS_AT_ONCE partials, `partials_per_query` counted in one key/value head."""
    limit = max(1, PARTIALS_AT_ONCE // partials_per_query)
    for together in _together(sequences, limit, partials_per_query, block_size):
        heads_at_once = max(1, limit // sum(sequence.queries for sequence in together))
        for head in range(0, kv_heads, heads_at_once):
            yield Part(together, slice(head, head + heads_at_once))


def tiled(part: Part, selected_JTGK: Tensor, block_size: int) -> Tiling:
    """Make the tiles for the own blocks and the selected past blocks of a part, given what was selected in it."""
    rows, ranks = selected_JTGK.shape[:3].numel(), selected_JTGK.shape[3]
    tiles = [*_past_tiles(part, selected_JTGK, block_size), *_own_tiles(part, selected_JTGK, block_size)]
    partials = sum(t.row_LR.numel() for t in tiles)
    columns = ranks + 2
    # One more row takes the partials of padding.
    partials_of_row = torch.full((rows + 1, columns), partials, dtype=torch.int32, device="cpu")
    start = 0
    for t in tiles:
        end = start + t.row_LR.numel()
        entry_LR = t.row_LR * columns + t.rank
        partials_of_row.view(-1)[entry_LR.flatten()] = torch.arange(start, end, dtype=torch.int32, device="cpu")
        start = end
    return Tiling(tiles, partials_of_row[:rows], partials)


def sequences_of(cu_q: list[int], cu_k: list[int]) -> list[Sequence]:
    """List the sequences between packed boundaries."""
    return [
        Sequence(q_start, q_end - q_start, k_start, k_end - k_start)
        for (q_start, q_end), (k_start, k_end) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    ]


def _together(
    sequences: Iterable[Sequence], limit: int, partials_per_query: int, block_size: int
) -> Iterator[list[Sequence]]:
    """Group sequences that follow one another up to `limit` queries, cutting longer ones."""
    group: list[Sequence] = []
    queries = 0
    for sequence in sequences:
        enough = ROWS_PER_BLOCK * (sequence.keys // block_size) // partials_per_query
        for piece in _ranges(sequence, max(limit, enough), block_size):
            if group and queries + piece.queries > limit:
                yield group
                group, queries = [], 0
            group.append(piece)
            queries += piece.queries
    if group:
        yield group


def _ranges(sequence: Sequence, limit: int, block_size: int) -> Iterator[Sequence]:
    """Cut a sequence into ranges of about `limit` queries that end at block boundaries; none without queries."""
    q_start, queries, k_start, keys = sequence
    offset = keys - queries
    start = 0
    while start < queries:
        boundary = -(-(offset + start + limit) // block_size) * block_size
        end = min(queries, boundary - offset)
        yield Sequence(q_start + start, end - start, k_start, offset + end)
        start = end


def _past_tiles(part: Part, selected_JTGK: Tensor, block_size: int) -> Iterator[Tiles]:
    """Sort the (query row, block) pairs by block, and cut each block's rows into tiles."""
    heads, queries, group, ranks = selected_JTGK.shape
    blocks = [sequence.keys // block_size for sequence in part.sequences]
    if ranks == 0 or sum(blocks) == 0:
        return
    pair_block, key_N = _pair_blocks(part, selected_JTGK, blocks, block_size)
    sorted_block, pair = pair_block.sort(stable=True)
    left_N = torch.bincount(sorted_block, minlength=len(key_N) + 1)[:-1]
    end_N = left_N.cumsum(0)
    for size in TILE_ROWS:
        tiles_N = left_N // size if size != TILE_ROWS[-1] else (left_N + size - 1) // size
        block_L = torch.repeat_interleave(tiles_N)
        if len(block_L) == 0:
            continue
        nth_L = torch.arange(len(block_L), device="cpu") - (tiles_N.cumsum(0) - tiles_N)[block_L]
        place_LR = ((end_N - left_N)[block_L] + nth_L * size)[:, None] + torch.arange(size, device="cpu")
        padding_LR = place_LR >= end_N[block_L, None]
        pair_LR = pair[place_LR.clamp_(max=len(pair) - 1)]
        row_LR = (pair_LR // ranks).masked_fill_(padding_LR, heads * queries * group)
        yield Tiles(row_LR, pair_LR % ranks, key_N[block_L], block_size, causal=False)
        left_N = left_N - tiles_N * size


def _pair_blocks(part: Part, selected_JTGK: Tensor, blocks: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Number the blocks of all heads and sequences: the block of each pair, and each block's first key row.

    Pairs without a block get the number after the last.
    """
    heads, total = selected_JTGK.shape[0], sum(blocks)
    count_S = torch.tensor(blocks, device="cpu")
    queries_S = torch.tensor([sequence.queries for sequence in part.sequences], device="cpu")
    first_T = (count_S.cumsum(0) - count_S).repeat_interleave(queries_S)
    first_JT = first_T + torch.arange(heads, device="cpu")[:, None] * total
    block_JTGK = selected_JTGK + first_JT.int()[:, :, None, None]
    block_JTGK.masked_fill_(selected_JTGK < 0, heads * total)

    keys = part.keys
    key_N = torch.cat(
        [
            torch.arange(count, device="cpu") * block_size + sequence.k_start - keys.start
            for count, sequence in zip(blocks, part.sequences, strict=True)
        ]
    )
    key_JN = key_N + torch.arange(heads, device="cpu")[:, None] * (keys.stop - keys.start)
    return block_JTGK.flatten(), key_JN.flatten()


def _own_tiles(part: Part, selected_JTGK: Tensor, block_size: int) -> Iterator[Tiles]:
    """Yield causal squares along the diagonal, and the keys of the own block before a sequence's first query."""
    ranks = selected_JTGK.shape[-1]
    squares, lead_ins = defaultdict(list), defaultdict(list)
    for q_start, queries, k_start, keys in part.sequences:
        q_start -= part.queries.start
        k_start += keys - queries - part.keys.start
        lead = (keys - queries) % block_size
        first = min(queries, block_size - lead) if lead else 0
        if first:
            lead_ins[first, lead].append(torch.tensor([[q_start, k_start - lead]], device="cpu"))
            squares[first].append(torch.tensor([[q_start, k_start]], device="cpu"))
        starts = torch.arange(first, queries, block_size, device="cpu")[:, None] + torch.tensor(
            [q_start, k_start], device="cpu"
        )
        whole = (queries - first) // block_size
        squares[block_size].append(starts[:whole])
        squares[(queries - first) % block_size].append(starts[whole:])
    for size, cells in squares.items():
        yield from _cell_tiles(part, selected_JTGK, torch.cat(cells), size, size, causal=True, rank=ranks)
    for (size, span), cells in lead_ins.items():
        yield from _cell_tiles(part, selected_JTGK, torch.cat(cells), size, span, causal=False, rank=ranks + 1)


def _cell_tiles(
    part: Part, selected_JTGK: Tensor, start_L2: Tensor, size: int, span: int, *, causal: bool, rank: int
) -> Iterator[Tiles]:
    """Make tiles of `size` queries from `start_L2[:, 0]` on over `span` keys from `start_L2[:, 1]` on, in all heads."""
    if len(start_L2) == 0:
        return
    heads, queries, group, _ = selected_JTGK.shape
    keys = part.keys.stop - part.keys.start
    head_J = torch.arange(heads, device="cpu")[:, None]
    key_JL = head_J * keys + start_L2[:, 1]
    query_JLR = (head_J * queries + start_L2[:, 0])[:, :, None] + torch.arange(size, device="cpu")
    row_JLGR = query_JLR[:, :, None] * group + torch.arange(group, device="cpu")[:, None]
    key_JLG = key_JL[:, :, None].expand(-1, -1, group)
    yield Tiles(row_JLGR.flatten(0, 2), rank, key_JLG.flatten(), span, causal)
