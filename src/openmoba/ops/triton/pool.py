"""Pool: one centroid per complete block, as `openmoba.ops.centroids` defines what is stored."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.centroids import ANCHOR_KEYS, LARGEST_FP16, ROOM, centroid_dtype
from openmoba.ops.triton.arguments import Rows
from openmoba.ops.triton.geometry import Geometry, kernel_width, locate, power_of_two, span, strides
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.table import row_offset

_LARGEST_FP16 = tl.constexpr(LARGEST_FP16)
_ROOM = tl.constexpr(ROOM)


def pool(k: Tensor, cu_k: Tensor | None, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return the centroids `[Hkv, block_slots, D]` and their norms, fp32 `[Hkv, block_slots]`.

    D is the width padded with zeros to a power of two. Centroids are fp16, fp32 for fp32 keys. Those of
    block slots without a complete block stay undefined.
    """
    shape = (geometry.kv_heads, geometry.block_slots)
    centroids = torch.empty((*shape, geometry.padded_width), dtype=centroid_dtype(k.dtype), device=k.device)
    norms = torch.empty(shape, dtype=torch.float32, device=k.device)
    _launch(geometry, strides(k))(k, centroids, norms, cu_k)
    return centroids, norms


@lru_cache(maxsize=REMEMBERED)
def _launch(geometry: Geometry, k_strides: tuple[int, int, int]) -> Launch:
    sizes = (geometry.sequences, geometry.tokens_k, geometry.block_size, geometry.block_slots)
    arguments = (Rows.of(k_strides), TENSOR, TENSOR, TENSOR, *sizes)
    constants = centroid_sizes(geometry.block_size, geometry.width) | {"PACKED": geometry.packed, "num_warps": 4}
    return Launch(_pool, (geometry.block_slots, geometry.kv_heads), arguments, constants)


def centroid_sizes(block_size: int, width: int) -> dict[str, int]:
    """Return the sizes that `block_centroid` is compiled for, of blocks of `block_size` keys of `width` numbers."""
    anchor, d = min(ANCHOR_KEYS, block_size), kernel_width(width)
    return {
        "ANCHOR": anchor,
        "ANCHOR_TILE": power_of_two(anchor),
        "CHUNK": power_of_two(min(block_size, 16384 // d)),
        "WIDTH": width,
        "D": d,
    }


@triton.jit
def scale_to(x, TARGET: tl.constexpr):
    """Return the power of two that takes x > 0 into [2^TARGET, 2^(TARGET + 1)); 1 for 0."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    scale_bits = tl.minimum(tl.maximum(254 - exponent + TARGET, 1), 254) << 23
    return tl.where(x > 0, scale_bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def block_centroid(
    k_ptr, block, block_size, stride_t, dtype: tl.constexpr, ANCHOR: tl.constexpr, ANCHOR_TILE: tl.constexpr,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, table=None, sequence=0, stride_page=0,
):  # fmt: skip
    """Return the centroid `[D]` of a complete block; `k_ptr` is where the sequence's keys of one head begin.

    With a `table`, it is where the first page's keys of that head begin.
    """
    # The anchor is the sequence's, not the block's: every program works it out again, which saves a launch.
    d_D = tl.arange(0, D)
    real_D = d_D < WIDTH
    key_A = tl.arange(0, ANCHOR_TILE)
    anchor_mask = (key_A < ANCHOR)[:, None] & real_D
    at_A = row_offset(key_A[:, None], stride_t, (key_A < ANCHOR)[:, None], table, sequence, stride_page)
    first_AD = tl.load(k_ptr + at_A + d_D, mask=anchor_mask, other=0.0).to(tl.float32)
    anchor_D = tl.sum(first_AD, 0) / ANCHOR
    spread = tl.max(tl.max(tl.where(anchor_mask, tl.abs(first_AD - anchor_D), 0.0), 1), 0)
    scale = scale_to(tl.maximum(spread, tl.max(tl.abs(anchor_D), 0) / 64), _ROOM)

    # The anchor is taken off in fp32: in 16 bits the mean would have lost what blocks differ in.
    key_C = tl.arange(0, CHUNK)
    sum_D = tl.zeros([D], tl.float32)
    for start in range(0, block_size, CHUNK):
        at_C = (start + key_C)[:, None]
        rows = k_ptr + row_offset(block * block_size + at_C, stride_t, at_C < block_size, table, sequence, stride_page)
        sum_D += tl.sum(tl.load(rows + d_D, mask=(at_C < block_size) & real_D, other=0.0).to(tl.float32), 0)
    centroid_D = (sum_D / block_size - anchor_D) * scale
    if dtype == tl.float16:
        centroid_D = tl.minimum(tl.maximum(centroid_D, -_LARGEST_FP16), _LARGEST_FP16)
    return centroid_D.to(dtype)


@triton.jit
def _pool(
    k, centroid_ptr, norm_ptr, cu_k_ptr, sequences, tokens_k, block_size, block_slots,
    ANCHOR: tl.constexpr, ANCHOR_TILE: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    block_slot = tl.program_id(0)
    head = tl.program_id(1)
    sequence, block = locate(block_slot, cu_k_ptr, sequences, tokens_k, block_size, PACKED)
    begin, length = span(sequence, cu_k_ptr, tokens_k, PACKED)
    if (block + 1) * block_size > length:
        return
    k_ptr = k.ptr + tl.cast(sequence, tl.int64) * k.batch + tl.cast(begin, tl.int64) * k.token
    k_ptr += tl.cast(head, tl.int64) * k.head
    centroid_D = block_centroid(
        k_ptr, block, block_size, k.token, centroid_ptr.dtype.element_ty, ANCHOR, ANCHOR_TILE, CHUNK, WIDTH, D
    )
    out = head * block_slots + block_slot
    tl.store(centroid_ptr + out.to(tl.int64) * D + tl.arange(0, D), centroid_D)
    wide_D = centroid_D.to(tl.float32)
    tl.store(norm_ptr + out, tl.sqrt(tl.sum(wide_D * wide_D, 0)))
