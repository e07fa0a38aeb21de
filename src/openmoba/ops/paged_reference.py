"""Attention over a block table in torch operations, which kernels are tested by (`openmoba.ops.backends.PagedDecoder`).

They look at the values of tables and lengths. A few new tokens read the blocks they choose, where they lie; a chunk of
a prompt, whose queries together read nearly every block, gets its keys side by side first.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from openmoba.ops.api import moba_attention
from openmoba.ops.arguments import KeyPages
from openmoba.ops.decode import MAX_QUERIES
from openmoba.ops.pages import complete_pages
from openmoba.ops.reference import decode_one, key_head_of

# Z pages of the cache, P tokens of a page, B sequences, M pages of a sequence in the table, N new tokens of all
# sequences, T those of one, C complete blocks, S positions in a sequence, H query heads, Hkv key heads, D head width


def attend_paged(q: Tensor, cache: KeyPages, v_pages: Tensor, top_k: int, scale: float) -> Tensor:
    """Do what `openmoba.moba_paged` says, of checked arguments."""
    sequences = _lengths(cache)
    starts = cache.cu_q.tolist()
    if starts[-1] > q.shape[0]:
        raise ValueError(f"cu_seqlens_q must end within q's {q.shape[0]} tokens, got {starts[-1]}")
    out = q.new_zeros(q.shape)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for row, ((length, new), start) in enumerate(zip(sequences, starts, strict=False)):
            table_1M = cache.block_table[row : row + 1, : -(-length // v_pages.shape[1])]
            attend = _prefill if new > MAX_QUERIES else _decode
            if new:
                q_THD, own = q[start : start + new], cache._replace(block_table=table_1M)
                out[start : start + new] = attend(q_THD, own, v_pages, length, top_k, scale)
    return out


def _prefill(q_THD: Tensor, cache: KeyPages, v_pages: Tensor, length: int, top_k: int, scale: float) -> Tensor:
    """Attend for a chunk of one sequence's prompt, `[T, H, D]`, after its keys were copied side by side."""
    k_1SHD, v_1SHD = (x[cache.block_table[0]].flatten(0, 1)[None, :length] for x in (cache.k_pages, v_pages))
    return moba_attention(q_THD[None], k_1SHD, v_1SHD, block_size=cache.block_size, top_k=top_k, scale=scale)[0]


def _decode(q_THD: Tensor, cache: KeyPages, v_pages: Tensor, length: int, top_k: int, scale: float) -> Tensor:
    """Attend for one sequence's last few tokens, `[T, H, D]`, which read the blocks they choose where these lie."""
    centroids, k_pages, table_1M, _, _, block_size = cache
    page_size, device = k_pages.shape[1], q_THD.device
    block_1C = torch.arange(length // block_size, device=device)[None]
    centroid_1CHD = centroids[_home(table_1M, block_1C, page_size, block_size)]

    def at(position_1HS: Tensor) -> tuple[Tensor, Tensor]:
        position_1N = position_1HS.clamp(0, length - 1).flatten(1)
        page, place = (x.view_as(position_1HS) for x in _page_and_place(table_1M, position_1N, page_size))
        where = page, place, key_head_of(q_THD, k_pages)
        return _rows(k_pages, *where), _rows(v_pages, *where)

    position_T = torch.arange(length - q_THD.shape[0], length, device=device)
    block_size = min(block_size, length)  # a larger one holds no more keys
    rows = [
        decode_one(q_HD[None], centroid_1CHD, position[None], at, block_size, top_k, scale)
        for q_HD, position in zip(q_THD, position_T, strict=True)
    ]
    return torch.cat(rows)


def complete_paged(cache: KeyPages) -> None:
    """Do what `openmoba.complete_paged` says, of checked arguments."""
    centroids, k_pages, block_table, _, _, block_size = cache
    rows, blocks = [], []
    for row, (length, new) in enumerate(_lengths(cache)):
        for block in range((length - new) // block_size, length // block_size):
            rows.append(row)
            blocks.append(block)
    if not rows:
        return
    table_NM, block_N1 = block_table[rows], torch.tensor(blocks, device=k_pages.device)[:, None]
    place_1K = torch.arange(block_size, device=k_pages.device)[None]
    # A little cache per block: behind the sequence's first one, which holds the keys that centroids are relative to.
    position_NS = torch.cat([place_1K.expand(len(rows), -1), block_N1 * block_size + place_1K], 1)
    key_NSHD = k_pages[_page_and_place(table_NM, position_NS, k_pages.shape[1])]
    new_N2HD = centroids.new_empty((len(rows), 2, *centroids.shape[2:]))
    lengths = torch.full((len(rows),), 2 * block_size, dtype=torch.int32, device=k_pages.device)
    complete_pages(new_N2HD, key_NSHD, lengths, None, block_size, block_size)
    page_N1, place_N1 = _home(table_NM, block_N1, k_pages.shape[1], block_size)
    centroids[page_N1[:, 0], place_N1[:, 0]] = new_N2HD[:, 1]


def _rows(pages_ZPHD: Tensor, page: Tensor, place: Tensor, head: Tensor) -> Tensor:
    """Return `pages_ZPHD[page, place, head]`, copied by rows, which on a CPU takes a fifth of the time."""
    *strides, in_row = pages_ZPHD.stride()
    step = max(1, math.gcd(*strides))
    last = sum((size - 1) * stride for size, stride in zip(pages_ZPHD.shape, strides, strict=False))
    rows_ND = pages_ZPHD.as_strided((last // step + 1, pages_ZPHD.shape[3]), (step, in_row))
    number = (page * strides[0] + place * strides[1] + head * strides[2]) // step
    return rows_ND.index_select(0, number.flatten()).view(*number.shape, -1)


def _page_and_place(table_NM: Tensor, position_NS: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return page and place within it of positions in sequences, int64 `[N, S]` each."""
    return table_NM.long().gather(1, position_NS // page_size), position_NS % page_size


def _home(table_NM: Tensor, block_NC: Tensor, page_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return page and place within `centroids` of blocks of sequences, int64 `[N, C]` each."""
    page_NC, place_NC = _page_and_place(table_NM, (block_NC + 1) * block_size - 1, page_size)
    return page_NC, place_NC // block_size


def _lengths(cache: KeyPages) -> list[tuple[int, int]]:
    """Return tokens in the cache and new tokens of each sequence; ValueError unless the table has room for them."""
    _, k_pages, block_table, lengths, cu_seqlens_q, _ = cache
    pages = block_table.shape[1]
    if int(cu_seqlens_q[0]) != 0:
        raise ValueError(f"cu_seqlens_q must start at 0, got {int(cu_seqlens_q[0])}")
    news = [end - start for start, end in pairwise(cu_seqlens_q.tolist())]
    found = list(zip(lengths.tolist(), news, strict=True))
    for row, (length, new) in enumerate(found):
        if not 0 <= new <= length <= pages * k_pages.shape[1]:
            raise ValueError(
                f"sequence {row} has {length} tokens in a cache with room for {pages * k_pages.shape[1]} of it, "
                f"{new} of them new; lengths count the new tokens, and block_table names pages for all"
            )
        used = block_table[row, : -(-length // k_pages.shape[1])]
        if length and not 0 <= int(used.min()) <= int(used.max()) < k_pages.shape[0]:
            raise ValueError(f"block_table names pages {used.tolist()} of sequence {row}; there are {k_pages.shape[0]}")
    return found
