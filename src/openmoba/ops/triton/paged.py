"""MoBA over a block table (`openmoba.ops.paged`): what lies in pages is read where it lies.

    upkeep    a few programs per sequence and head look for blocks that new tokens completed, and pool their keys
    decoding  the kernels of `decode` look up each query's sequence, each block's centroid and each tile's page
    prefill   centroids are brought side by side, 1 / (2 block_size) of the cache; then route, plan and attention are
              those of a packed call (`attention`), whose kernels look up each block's page

A batch of few query tokens is decoded (`are_few`), any other prefilled; which kernels run changes nothing else.
Nothing here waits for the device: launches depend on shapes alone, and what the block table has room for counts.

H key/value heads padded to a power of two, D head width padded to one (WIDTH is the real one).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from openmoba.ops.arguments import KeyPages
from openmoba.ops.triton import attention, decode
from openmoba.ops.triton.arguments import Rows, Table
from openmoba.ops.triton.geometry import Geometry, Heads, Paging, cdiv, locate, power_of_two, span, strides
from openmoba.ops.triton.host.device import multiprocessors
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.pool import block_centroid, centroid_sizes
from openmoba.ops.triton.route import new_sort_keys, write_sort_keys
from openmoba.ops.triton.table import page_of

# Query tokens that are decoded: decoding reads keys once per row, prefill once per list, and has more launches.
_FEW, _FEW_PER_SEQUENCE = 64, 4
_MOST_DECODED = 65535  # programs in a grid's third dimension
_POOLING_PROGRAMS_PER_MULTIPROCESSOR = 4


def attend_paged(q: Tensor, cache: KeyPages, v_pages: Tensor, top_k: int, scale: float) -> Tensor:
    """Do what `openmoba.moba_paged` says, checked; the last dimension of all tensors is contiguous."""
    tokens, (sequences, pages) = q.shape[0], cache.block_table.shape
    if tokens == 0 or sequences == 0 or pages == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if are_few(tokens, sequences):
        launches = decode.packed_launches(q, cache, v_pages, top_k, scale)
        if tokens <= sequences or 4 * launches.numbers <= attention.workspaces(q.device)[0]:
            return decode.run_packed(launches, q, cache, v_pages)
    return _prefill(q, cache, v_pages, top_k, scale)


def are_few(tokens: int, sequences: int) -> bool:
    """Say whether so many query tokens are for decoding, if their scores fit in memory."""
    return tokens <= min(max(_FEW, _FEW_PER_SEQUENCE * sequences), _MOST_DECODED)


def complete_paged(cache: KeyPages) -> None:
    """Do what `openmoba.complete_paged` says, checked; the last dimension of all tensors is contiguous."""
    centroids, k_pages, block_table, lengths, cu_q, block_size = cache
    sequences, pages = block_table.shape
    room = pages * k_pages.shape[1]
    if sequences:  # also where no block fits: that lengths fit in the table is asserted there
        paging = Paging(block_table.stride(0), k_pages.shape[1])
        launch = _completing(
            sequences, room, *k_pages.shape[2:], block_size, strides(k_pages), strides(centroids), paging,
            _POOLING_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(k_pages.device),
        )  # fmt: skip
        launch(k_pages, centroids, block_table, lengths, cu_q)


@lru_cache(maxsize=REMEMBERED)
def _completing(
    sequences: int,
    room: int,
    kv_heads: int,
    width: int,
    block_size: int,
    key_strides: tuple[int, int, int],
    centroid_strides: tuple[int, int, int],
    paging: Paging,
    programs: int,
) -> Launch:
    together = max(1, min(room // block_size, cdiv(programs, sequences * kv_heads)))
    rows = Rows.of(key_strides), Rows.of(centroid_strides)
    arguments = (*rows, Table(TENSOR, *paging), TENSOR, TENSOR, room, block_size)
    constants = centroid_sizes(block_size, width) | {"num_warps": 4}
    constants |= {"debug": True, "sanitize_overflow": False}  # keep assertions, but not those of the compiler's own
    return Launch(_complete_blocks, (together, kv_heads, sequences), arguments, constants)


def _prefill(q: Tensor, cache: KeyPages, v_pages: Tensor, top_k: int, scale: float) -> Tensor:
    """Attend as a packed call does whose keys are the sequences' tokens in the cache, one sequence behind the other."""
    centroids, k_pages, block_table, lengths, cu_q, block_size = cache
    geometry = _geometry(*q.shape, *block_table.shape, block_table.stride(0), *k_pages.shape[1:3], block_size, top_k)
    attention.check_pairs(geometry)
    q = attention.near(q, geometry.group)
    cu_k = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # what fills up a graph's batch is of no sequence
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    choice = torch.empty(attention.choice_numbers(geometry, given=False), dtype=torch.int32, device=q.device)
    heads, sort_keys = attention.heads_at_once(geometry, q.dtype, q.device), None
    if geometry.top_k > 1:
        sort_keys = new_sort_keys(geometry, heads, q.device).fill_(heads * geometry.block_slots)
        pooled = _side_by_side(centroids, block_table, cu_k, geometry)
        write_sort_keys(sort_keys, q, pooled, cu_q, cu_k, geometry, heads)
    attention.attend(q, k_pages, v_pages, cu_q, cu_k, geometry, scale, heads, sort_keys, choice, out, lse, block_table)
    return out


@lru_cache(maxsize=REMEMBERED)
def _geometry(
    tokens: int,
    heads: int,
    width: int,
    sequences: int,
    pages: int,
    table_stride: int,
    page_size: int,
    kv_heads: int,
    block_size: int,
    top_k: int,
) -> Geometry:
    room = pages * page_size
    most_read = min(top_k, cdiv(room, block_size))
    shape, paging = Heads(heads, kv_heads, width), Paging(table_stride, page_size)
    return Geometry(True, sequences, tokens, sequences * room, shape, min(block_size, room), most_read, paging)


def _side_by_side(centroids: Tensor, block_table: Tensor, cu_k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return the centroids of all complete blocks, and their norms, as `pool` does."""
    shape = (geometry.kv_heads, geometry.block_slots)
    pooled = torch.empty((*shape, geometry.padded_width), dtype=centroids.dtype, device=centroids.device)
    norms = torch.empty(shape, dtype=torch.float32, device=centroids.device)
    _gathering(geometry, strides(centroids))(centroids, block_table, pooled, norms, cu_k)
    return pooled, norms


@lru_cache(maxsize=REMEMBERED)
def _gathering(geometry: Geometry, centroid_strides: tuple[int, int, int]) -> Launch:
    assert geometry.paging is not None
    sizes = (geometry.sequences, geometry.block_size, geometry.block_slots, geometry.kv_heads)
    arguments = (Rows.of(centroid_strides), Table(TENSOR, *geometry.paging), TENSOR, TENSOR, TENSOR, *sizes)
    constants = {"H": power_of_two(geometry.kv_heads), "WIDTH": geometry.width, "D": geometry.padded_width}
    return Launch(_gather, (geometry.block_slots,), arguments, constants | {"num_warps": 4})


@triton.jit
def _complete_blocks(
    k,
    centroids,
    table,
    length_ptr,
    cu_q_ptr,
    room,
    block_size,
    ANCHOR: tl.constexpr,
    ANCHOR_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Write centroids of some of the blocks that the new tokens of a sequence completed, for one head."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    _begin, new = span(sequence, cu_q_ptr, 0, True)
    length = tl.load(length_ptr + sequence)
    counted = (new >= 0) & (new <= length) & (length <= room)
    tl.device_assert(counted, "lengths must count the new tokens, and block_table must name pages for all of them")
    first = tl.maximum(length - new, 0) // block_size + tl.program_id(0)
    k_ptr = k.ptr + head.to(tl.int64) * k.head
    centroid_ptr = centroids.ptr + head.to(tl.int64) * centroids.head
    d_D = tl.arange(0, D)
    for block in range(first, length // block_size, tl.num_programs(0)):
        centroid_D = block_centroid(
            k_ptr, block, block_size, k.token, centroids.ptr.dtype.element_ty, ANCHOR, ANCHOR_TILE, CHUNK, WIDTH, D,
            table, sequence, k.batch,
        )  # fmt: skip
        page, place = page_of(table, sequence, (block + 1) * block_size - 1)
        at = page * centroids.batch + (place // block_size).to(tl.int64) * centroids.token
        tl.store(centroid_ptr + at + d_D, centroid_D, mask=d_D < WIDTH)


@triton.jit
def _gather(
    centroids,
    table,
    out_ptr,
    norm_ptr,
    cu_k_ptr,
    sequences,
    block_size,
    block_slots,
    kv_heads,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Write the centroids of a block slot side by side, of all heads, and their norms, if it has a complete block."""
    block_slot = tl.program_id(0)
    sequence, block = locate(block_slot, cu_k_ptr, sequences, 0, block_size, True)
    _begin, length = span(sequence, cu_k_ptr, 0, True)
    if (block + 1) * block_size > length:
        return
    page, place = page_of(table, sequence, (block + 1) * block_size - 1)
    h_H = tl.arange(0, H)
    d_D = tl.arange(0, D)
    base = centroids.ptr + page * centroids.batch + (place // block_size).to(tl.int64) * centroids.token
    exists_HD = (h_H < kv_heads)[:, None] & (d_D < WIDTH)[None, :]
    at_HD = h_H.to(tl.int64)[:, None] * centroids.head + d_D[None, :]
    centroid_HD = tl.load(base + at_HD, mask=exists_HD, other=0.0)
    out_H = h_H * block_slots + block_slot
    out_at_HD = out_H.to(tl.int64)[:, None] * D + d_D[None, :]
    tl.store(out_ptr + out_at_HD, centroid_HD, mask=(h_H < kv_heads)[:, None])
    wide_HD = centroid_HD.to(tl.float32)
    tl.store(norm_ptr + out_H, tl.sqrt(tl.sum(wide_HD * wide_HD, 1)), mask=h_H < kv_heads)
