"""MoBA over a paged cache, as servers keep one: keys and values lie in pages that a block table names.

    token t of sequence b  lies in page  block_table[b, t // P]  at place  t % P        (P tokens of a page)

A server shares pages between sequences that begin alike, moves sequences in and out at every step, and hands over one
packed batch: some sequences go on by a token or a few, some by a chunk of their prompt. Blocks and pages may differ in
size, as long as one divides the other. The centroid of a block lies with the page that holds the block's last token,
and has the same value as in a cache of its own (`openmoba.ops.pages`): that page is shared by none but sequences that
begin alike, up to it. So centroids follow their pages, and need no upkeep but for tokens that are written.

A few new tokens read the blocks they choose, where they lie. A chunk of a prompt, whose queries together read nearly
every block, gets its keys side by side first. Torch operations that look at the values of tables and lengths: for the
CPU, and as the specification of kernels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from openmoba.config import check_blocks
from openmoba.ops.api import moba_attention
from openmoba.ops.centroids import centroid_dtype
from openmoba.ops.checks import check_scale, needs_gradient
from openmoba.ops.decode import MAX_QUERIES
from openmoba.ops.pages import complete_pages
from openmoba.ops.reference import accumulation_dtype, choose_blocks

# Z pages of the cache, P tokens of a page, B sequences, M pages of a sequence in the table, N new tokens of all
# sequences, T those of one, C complete blocks, K blocks read, H query heads, Hkv key/value heads, D head width


def new_paged_centroids(k_pages: Tensor, block_size: int) -> Tensor:
    """Return undefined centroids `[Z, blocks that end in a page, Hkv, D]` for keys `[Z, P, Hkv, D]`.

    Raises:
        ValueError: neither of page and block size divides the other.
    """
    pages, page_size, heads, width = k_pages.shape
    _check_sizes(page_size, block_size)
    shape = (pages, max(1, page_size // block_size), heads, width)
    return torch.empty(shape, dtype=centroid_dtype(k_pages.dtype), device=k_pages.device)


def complete_paged(
    centroids: Tensor, k_pages: Tensor, block_table: Tensor, lengths: Tensor, cu_seqlens_q: Tensor, block_size: int
) -> None:
    """Write the centroids of the blocks that the new tokens complete, before anybody attends to them.

    Args:
        centroids: as `new_paged_centroids` gave them.
        k_pages, block_table, lengths, cu_seqlens_q, block_size: as in `moba_paged`.

    Raises:
        ValueError: naming the argument and its value.
    """
    _check_cache(centroids, k_pages, block_table, lengths, block_size)
    rows, blocks = [], []
    for row, (length, new) in enumerate(_lengths(k_pages, block_table, lengths, cu_seqlens_q)):
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
    slots = torch.full((len(rows),), 2 * block_size, dtype=torch.int32, device=k_pages.device)
    complete_pages(new_N2HD, key_NSHD, slots, None, block_size, block_size)
    page_N1, place_N1 = _home(table_NM, block_N1, k_pages.shape[1], block_size)
    centroids[page_N1[:, 0], place_N1[:, 0]] = new_N2HD[:, 1]


def moba_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    centroids: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
) -> Tensor:
    """Attend for the last tokens of each sequence to its own tokens in the cache, `top_k` blocks per query and head.

    Args:
        q: the new tokens' queries, packed, `[N, H, D]`.
        k_pages, v_pages: `[Z, P, Hkv, D]`, any strides; the new tokens' keys and values already written.
        centroids: as `new_paged_centroids` gave them, brought up to date by `complete_paged`.
        block_table: int32 `[B, M]`, pages of each sequence in order; anything behind its last page.
        lengths: int32 `[B]`, tokens of each sequence in the cache, the new ones included.
        cu_seqlens_q: int32 `[B + 1]`, where each sequence's new tokens begin in q.
        block_size, top_k, scale: as in `openmoba.moba_attention`. Either of P and `block_size` divides the other.

    Returns:
        `[N, H, D]` in q's dtype. Not differentiable.

    Raises:
        ValueError: naming the argument and its value, or that an input requires a gradient.
    """
    check_blocks(block_size, top_k)
    _check_cache(centroids, k_pages, block_table, lengths, block_size)
    _check_queries(q, k_pages, v_pages)
    if needs_gradient(q, k_pages, v_pages):
        raise ValueError("moba_paged has no gradient, and an input requires one; use torch.no_grad()")
    scale = check_scale(q, scale)
    sequences = _lengths(k_pages, block_table, lengths, cu_seqlens_q)
    starts = cu_seqlens_q.tolist()
    if starts[-1] != q.shape[0]:
        raise ValueError(f"cu_seqlens_q must end at q's {q.shape[0]} tokens, got {starts[-1]}")
    out = torch.empty_like(q)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for table_M, (length, new), start in zip(block_table, sequences, starts, strict=False):
            q_THD, out_THD = (x[start : start + new] for x in (q, out))
            if new > MAX_QUERIES:
                pages_M = table_M[: -(-length // k_pages.shape[1])]
                k_SHD, v_SHD = (x[pages_M].flatten(0, 1)[:length] for x in (k_pages, v_pages))
                whole = moba_attention(
                    q_THD[None], k_SHD[None], v_SHD[None], block_size=block_size, top_k=top_k, scale=scale
                )
                out_THD.copy_(whole[0])
            elif new:
                block_THK = _choose(q_THD, centroids, table_M, length, k_pages.shape[1], block_size, top_k)
                for t in range(new):
                    position_HS = _positions(block_THK[t], length - new + t, block_size)
                    out_THD[t] = _attend(q_THD[t], k_pages, v_pages, table_M, position_HS, length - new + t, scale)
    return out


def _choose(
    q_THD: Tensor, centroids: Tensor, table_M: Tensor, length: int, page_size: int, block_size: int, top_k: int
) -> Tensor:
    """Return the past blocks that the last T tokens read, int32 `[T, H, K - 1]`, -1 for none."""
    block_C = torch.arange(length // block_size, device=q_THD.device)
    page_1C, place_1C = _home(table_M[None], block_C[None], page_size, block_size)
    wide, (tokens, _, width) = accumulation_dtype(q_THD.dtype), q_THD.shape
    centroid_CHD = centroids[page_1C[0], place_1C[0]].to(wide)
    q_THGD = q_THD.to(wide).reshape(tokens, centroid_CHD.shape[1], -1, width)
    score_THC = torch.einsum("thgd,chd->thgc", q_THGD, centroid_CHD).flatten(1, 2)
    own_T = torch.arange(length - tokens, length, device=q_THD.device) // block_size
    past_TC = block_C < own_T[:, None]
    return choose_blocks(score_THC.masked_fill(~past_TC[:, None], -math.inf)[None], top_k)[0]


def _positions(block_HK: Tensor, position: int, block_size: int) -> Tensor:
    """Return the positions in the chosen blocks and in the own one, `[H, K * block_size]`; negative for none."""
    own_H1 = block_HK.new_full((block_HK.shape[0], 1), position // block_size)
    start_HK = torch.cat([block_HK, own_H1], 1).long() * block_size
    return (start_HK[..., None] + torch.arange(block_size, device=block_HK.device)).flatten(1)


def _attend(
    q_HD: Tensor, k_pages: Tensor, v_pages: Tensor, table_M: Tensor, position_HS: Tensor, position: int, scale: float
) -> Tensor:
    """Attend for one query at `position`, which reads these positions as far as they are there: `[H, D]`."""
    reads_HS = (position_HS >= 0) & (position_HS <= position)
    page_HS, place_HS = _page_and_place(
        table_M.expand(position_HS.shape[0], -1), position_HS.clamp(0, position), k_pages.shape[1]
    )
    group = q_HD.shape[0] // k_pages.shape[2]
    head_H1 = (torch.arange(q_HD.shape[0], device=q_HD.device) // group)[:, None]
    wide = accumulation_dtype(q_HD.dtype)
    k_HSD, v_HSD = (x[page_HS, place_HS, head_H1].to(wide) for x in (k_pages, v_pages))
    logit_HS = scale * (k_HSD @ q_HD.to(wide)[..., None])[..., 0]
    weight_HS = logit_HS.masked_fill(~reads_HS, -math.inf).softmax(-1)
    return (weight_HS[:, None] @ v_HSD)[:, 0].to(q_HD.dtype)


def _page_and_place(table_NM: Tensor, position_NS: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return page and place within it of positions in sequences, int64 `[N, S]` each."""
    return table_NM.long().gather(1, position_NS // page_size), position_NS % page_size


def _home(table_NM: Tensor, block_NC: Tensor, page_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return page and place within `centroids` of blocks of sequences, int64 `[N, C]` each."""
    page_NC, place_NC = _page_and_place(table_NM, (block_NC + 1) * block_size - 1, page_size)
    return page_NC, place_NC // block_size


def _lengths(k_pages: Tensor, block_table: Tensor, lengths: Tensor, cu_seqlens_q: Tensor) -> list[tuple[int, int]]:
    """Return tokens in the cache and new tokens of each sequence; ValueError unless the table has room for them."""
    batch, pages = block_table.shape
    if cu_seqlens_q.dtype != torch.int32 or cu_seqlens_q.shape != (batch + 1,):
        got = f"{cu_seqlens_q.dtype} {tuple(cu_seqlens_q.shape)}"
        raise ValueError(f"cu_seqlens_q must be int32 [{batch + 1}], one more than block_table has rows, got {got}")
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


def _check_sizes(page_size: int, block_size: int) -> None:
    check_blocks(block_size, 1)
    if page_size % block_size and block_size % page_size:
        raise ValueError(
            f"blocks of {block_size} tokens and pages of {page_size}: one has to divide the other; choose a page size "
            f"of {block_size}"
        )


def _check_cache(centroids: Tensor, k_pages: Tensor, block_table: Tensor, lengths: Tensor, block_size: int) -> None:
    if k_pages.dim() != 4:
        raise ValueError(f"k_pages must be [pages, tokens of a page, heads, dim], got {tuple(k_pages.shape)}")
    pages, page_size, heads, width = k_pages.shape
    _check_sizes(page_size, block_size)
    shape, dtype = (pages, max(1, page_size // block_size), heads, width), centroid_dtype(k_pages.dtype)
    if centroids.dtype != dtype or centroids.shape != shape:
        raise ValueError(
            f"centroids must be {dtype} {list(shape)}, got {centroids.dtype} {list(centroids.shape)}; "
            "openmoba.ops.paged.new_paged_centroids makes them"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2:
        raise ValueError(
            f"block_table must be int32 [sequences, pages], got {block_table.dtype} {tuple(block_table.shape)}"
        )
    if lengths.dtype != torch.int32 or lengths.shape != block_table.shape[:1]:
        got = f"{lengths.dtype} {tuple(lengths.shape)}"
        raise ValueError(f"lengths must be int32 [{block_table.shape[0]}], one of each row of block_table, got {got}")


def _check_queries(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if v_pages.shape != k_pages.shape:
        raise ValueError(f"v_pages must have k_pages' shape {tuple(k_pages.shape)}, got {tuple(v_pages.shape)}")
    _, _, heads, width = k_pages.shape
    if q.dim() != 3 or q.shape[2] != width or q.shape[1] % heads:
        raise ValueError(f"q must be [tokens, a multiple of the cache's {heads} heads, {width}], got {tuple(q.shape)}")
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"q, k_pages and v_pages must share a dtype, got {q.dtype}, {k_pages.dtype}, {v_pages.dtype}")
