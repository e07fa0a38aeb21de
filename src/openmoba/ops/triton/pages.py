"""Centroids of the pages that new tokens completed, in one launch that waits for nothing.

A program per page that may be complete: it returns at once if the page is not, and otherwise runs the device code of
the prefill's pooling (`openmoba.ops.triton.pool`) over the page's cached keys.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from openmoba.ops.arguments import KeyCache
from openmoba.ops.triton.arguments import Rows
from openmoba.ops.triton.geometry import cdiv, strides
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.pool import block_centroid, centroid_sizes


def complete_pages(cache: KeyCache, new: int) -> None:
    """Do what `openmoba.ops.pages.complete_pages` says, checked; the last dimension of both caches is contiguous."""
    centroids, keys, lengths, starts, block_size = cache
    possible = min(centroids.shape[1], cdiv(new, block_size))
    if possible > 0:
        launch = _launch(*centroids.shape, possible, new, block_size, strides(keys), strides(centroids))
        launch(keys, centroids, lengths, starts)


@lru_cache(maxsize=REMEMBERED)
def _launch(
    batch: int,
    pages: int,
    kv_heads: int,
    width: int,
    possible: int,
    new: int,
    block_size: int,
    key_strides: tuple[int, int, int],
    centroid_strides: tuple[int, int, int],
) -> Launch:
    arguments = (Rows.of(key_strides), Rows.of(centroid_strides), TENSOR, TENSOR, new, pages, block_size)
    constants = centroid_sizes(block_size, width) | {"num_warps": 4}
    return Launch(_complete, (possible, kv_heads, batch), arguments, constants)


@triton.jit(do_not_specialize=["new", "pages"])
def _complete(
    k, centroids, length_ptr, start_ptr, new, pages, block_size,
    ANCHOR: tl.constexpr, ANCHOR_TILE: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + batch)
    page = tl.maximum(length - new, 0) // block_size + tl.program_id(0)
    if page >= tl.minimum(length // block_size, pages):
        return
    start = 0 if start_ptr is None else tl.load(start_ptr + batch)
    k_ptr = k.ptr + batch * k.batch + head * k.head + tl.cast(start, tl.int64) * k.token
    centroid_D = block_centroid(
        k_ptr, page, block_size, k.token, centroids.ptr.dtype.element_ty, ANCHOR, ANCHOR_TILE, CHUNK, WIDTH, D
    )
    centroid_ptr = centroids.ptr + batch * centroids.batch + head * centroids.head + page.to(tl.int64) * centroids.token
    d_D = tl.arange(0, D)
    tl.store(centroid_ptr + d_D, centroid_D, mask=d_D < WIDTH)
