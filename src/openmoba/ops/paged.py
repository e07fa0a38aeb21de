"""MoBA over a paged cache, as servers keep one: keys and values lie in pages that a block table names.

    token t of sequence b  lies in page  block_table[b, t // P]  at place  t % P        (P tokens of a page)

A server shares pages between sequences that begin alike, moves sequences in and out at every step, and hands over one
packed batch: some sequences go on by a token or a few, some by a chunk of their prompt. Blocks and pages may differ in
size, as long as one divides the other. The centroid of a block lies with the page that holds the block's last token,
and has the same value as in a cache of its own (`openmoba.ops.pages`): that page is shared by none but sequences that
begin alike, up to it. So centroids follow their pages, and need no upkeep but for tokens that are written.

On CUDA kernels do it (`openmoba.ops.triton.paged`), which read everything where it lies and wait for nothing. Elsewhere
torch operations do (`openmoba.ops.paged_reference`), which are their specification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmoba.config import check_blocks
from openmoba.ops import paged_reference
from openmoba.ops.arguments import KeyPages
from openmoba.ops.backends import DECODERS, PagedDecoder, implementation, paged_decoder
from openmoba.ops.centroids import centroid_dtype
from openmoba.ops.checks import (
    check_cache,
    check_head_width,
    check_rows,
    check_scale,
    check_tensors,
    needs_gradient,
)
from openmoba.ops.operation import operation

# Z pages of the cache, P tokens of a page, B sequences, M pages of a sequence in the table, N new tokens of all
# sequences, H query heads, Hkv key heads, D head width


@operation(PagedDecoder.attend_paged, fake=lambda _, q, *__: q.new_empty(q.shape))
def attend_paged(name: str, *arguments: Any) -> Tensor:
    """Attend over a block table, not differentiable."""
    return _decoder(name).attend_paged(*arguments)


@operation(PagedDecoder.complete_paged, fake=lambda *_: None, mutates=("centroids",))
def write_paged(name: str, *arguments: Any) -> None:
    """Write the centroids of the blocks that the new tokens complete."""
    _decoder(name).complete_paged(*arguments)


def _decoder(name: str) -> PagedDecoder:
    return paged_reference if name == "reference" else paged_decoder(name)


def new_paged_centroids(k_pages: Tensor, block_size: int) -> Tensor:
    """Return undefined centroids `[Z, blocks that end in a page, Hkv, D]` for keys `[Z, P, Hkv, D]`.

    Raises:
        ValueError: naming the argument and its value; neither of page and block size divides the other.
    """
    _check_pages(k_pages)
    pages, page_size, heads, width = k_pages.shape
    _check_sizes(page_size, block_size)
    shape = (pages, max(1, page_size // block_size), heads, width)
    return k_pages.new_empty(shape, dtype=centroid_dtype(k_pages.dtype))


def complete_paged(
    centroids: Tensor, k_pages: Tensor, block_table: Tensor, lengths: Tensor, cu_seqlens_q: Tensor, block_size: int
) -> None:
    """Write the centroids of the blocks that the new tokens complete, before anybody attends to them.

    Args:
        centroids: as `new_paged_centroids` gave them.
        k_pages, block_table, lengths, cu_seqlens_q, block_size: as in `moba_paged`.

    Raises:
        ValueError: naming the argument and its value. On CUDA the host reads no lengths: that they count the new
            tokens, and that the table has room for them, is asserted on the device.
    """
    cache = KeyPages(centroids, k_pages, block_table, lengths, cu_seqlens_q, block_size)
    _check_cache(cache)
    name, _ = implementation(k_pages, "auto", DECODERS)
    if name != "reference":
        _check_contiguous(centroids=centroids, k_pages=k_pages, block_table=block_table)
    write_paged(name, cache)


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
    impl: str = "auto",
) -> Tensor:
    """Attend for the last tokens of each sequence to its own tokens in the cache, `top_k` blocks per query and head.

    Args:
        q: the new tokens' queries, packed, `[N, H, D]`.
        k_pages, v_pages: `[Z, P, Hkv, D]`, any strides; the new tokens' keys and values already written. Kernels want
            a contiguous last dimension, of them, the centroids and the table.
        centroids: as `new_paged_centroids` gave them, brought up to date by `complete_paged`.
        block_table: int32 `[B, M]`, pages of each sequence in order; anything behind its last page. On CUDA kernels are
            launched for `M` pages of each sequence: no more columns than the longest sequence has pages make it quick.
        lengths: int32 `[B]`, tokens of each sequence in the cache, the new ones included.
        cu_seqlens_q: int32 `[B + 1]`, where each sequence's new tokens begin in q. Tokens of q behind the last one
            are of no sequence, and get zeros: what fills up the batch of a CUDA graph.
        block_size, top_k, scale: as in `openmoba.moba_attention`. Either of P and `block_size` divides the other.
        impl: "auto", "reference" or "triton", as in `openmoba.moba_decode`.

    Returns:
        `[N, H, D]` in q's dtype. Not differentiable.

    Raises:
        ValueError: naming the argument and its value, or that an input requires a gradient. Kernels take the values in
            `block_table`, `lengths` and `cu_seqlens_q` as they are: the host does not read them, the call waits for no
            device and fits a CUDA graph.
    """
    check_blocks(block_size, top_k)
    cache = KeyPages(centroids, k_pages, block_table, lengths, cu_seqlens_q, block_size)
    _check_cache(cache)
    _check_queries(q, k_pages, v_pages)
    if needs_gradient(q, k_pages, v_pages):
        raise ValueError("moba_paged has no gradient, and an input requires one; use torch.no_grad()")
    scale = check_scale(q, scale)
    name, _ = implementation(q, impl, DECODERS)
    if name != "reference":
        _check_contiguous(k_pages=k_pages, v_pages=v_pages, centroids=centroids, block_table=block_table)
        q = q if q.stride(-1) == 1 else q.contiguous()
    return attend_paged(name, q, cache, v_pages, top_k, scale)


def _check_sizes(page_size: int, block_size: int) -> None:
    check_blocks(block_size, 1)
    if page_size % block_size and block_size % page_size:
        raise ValueError(
            f"blocks of {block_size} tokens and pages of {page_size}: one has to divide the other; choose a page size "
            f"of {block_size}"
        )


def _check_contiguous(**named: Tensor) -> None:
    for name, x in named.items():
        if x.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {x.stride()}")


def _check_pages(k_pages: Tensor) -> None:
    layout = "[pages, tokens of a page, heads, dim]"
    check_cache("k_pages", k_pages, layout)
    if 0 in k_pages.shape[1:]:
        raise ValueError(f"k_pages must be {layout} with something in a page, got {tuple(k_pages.shape)}")


def _check_cache(cache: KeyPages) -> None:
    centroids, k_pages, block_table, lengths, cu_seqlens_q, block_size = cache
    check_tensors(
        k_pages=k_pages, centroids=centroids, block_table=block_table, lengths=lengths, cu_seqlens_q=cu_seqlens_q
    )
    _check_pages(k_pages)
    check_head_width(k_pages.shape[3])
    pages, page_size, heads, width = k_pages.shape
    _check_sizes(page_size, block_size)
    shape, dtype = (pages, max(1, page_size // block_size), heads, width), centroid_dtype(k_pages.dtype)
    if centroids.dtype != dtype or centroids.shape != shape:
        raise ValueError(
            f"centroids must be {dtype} {list(shape)}, got {centroids.dtype} {list(centroids.shape)}; "
            "openmoba.new_paged_centroids makes them"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2:
        raise ValueError(
            f"block_table must be int32 [sequences, pages], got {block_table.dtype} {tuple(block_table.shape)}"
        )
    check_rows(lengths, None, block_table)
    if cu_seqlens_q.dtype != torch.int32 or cu_seqlens_q.shape != (lengths.shape[0] + 1,):
        got = f"{cu_seqlens_q.dtype} {tuple(cu_seqlens_q.shape)}"
        wanted = f"int32 [{lengths.shape[0] + 1}], one more than block_table has rows"
        raise ValueError(f"cu_seqlens_q must be {wanted}, got {got}")
    on_device = {"centroids": centroids, "block_table": block_table, "cu_seqlens_q": cu_seqlens_q}
    for name, x in on_device.items():
        if x.device != k_pages.device:
            raise ValueError(f"{name} must be on k_pages' device {k_pages.device}, got {x.device}")


def _check_queries(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    check_tensors(q=q, v_pages=v_pages)
    if v_pages.shape != k_pages.shape:
        raise ValueError(f"v_pages must have k_pages' shape {tuple(k_pages.shape)}, got {tuple(v_pages.shape)}")
    _, _, heads, width = k_pages.shape
    if q.dim() != 3 or q.shape[2] != width or q.shape[1] % heads:
        raise ValueError(f"q must be [tokens, a multiple of the cache's {heads} heads, {width}], got {tuple(q.shape)}")
    for name, x in (("q", q), ("v_pages", v_pages)):
        if x.device != k_pages.device:
            raise ValueError(f"{name} must be on k_pages' device {k_pages.device}, got {x.device}")
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"q, k_pages and v_pages must share a dtype, got {q.dtype}, {k_pages.dtype}, {v_pages.dtype}")
