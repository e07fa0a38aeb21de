"""What the Hopper kernels share: layouts, and asynchronous copies of rows and of lists of pairs.

A kernel walks its list of pairs from the end to the beginning, M pairs per tile. The list of a block holds the rows
that chose it, in ascending order. Late rows choose among more blocks, so lists grow thin towards their ends, all alike:
walking backwards, the lists of a head are at about the same rows at the same time, and these stay in the L2 cache.

Where a row is takes two divisions: one lane works it out and passes it on through shared memory (`lane_layout`).

Data that asynchronous copies bring to shared memory need no proxy fence before a matrix product reads them; data that
threads store do.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

# Elements of 16 bytes, which all strides are multiples of. Addresses in shared memory are counted in them, so that the
# compiler sees aligned addresses.
VECTOR = gl.constexpr(8)

# Names that changed between releases of Triton: since 3.7, and since 3.8.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Begins a copy from memory to shared memory."""


@gluon.constexpr_function
def row_layout(width, warps):
    """Lay out rows of `width` 16-bit elements in pieces of 16 bytes, neighbouring lanes beside each other."""
    lanes = width // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(columns, rows_of_warps, columns_of_warps):
    """Lay out the accumulator of a matrix product, `columns` per instruction."""
    return gl.NVMMADistributedLayout([3, 0], [rows_of_warps, columns_of_warps], [16, columns, 16])


@gluon.constexpr_function
def lane_layout(rows, warps):
    """Lay out one of `rows` rows per lane, each warp its own; lanes beyond them the same again."""
    each = rows // warps
    lanes = [[1 << i] if 1 << i < each else [0] for i in range(5)]
    return gl.DistributedLinearLayout([], lanes, [[each << i] for i in range(warps.bit_length() - 1)], [], [rows])


@gluon.constexpr_function
def flat_layout(warps):
    """Lay out one element per thread."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def stages_around(stage, STAGES: gl.constexpr):
    """Return the buffers after and before `stage` in a circle; remainders would take registers in a loop."""
    return gl.where(stage == STAGES - 1, 0, stage + 1), gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def copy_rows(smem, base, offset_M, D: gl.constexpr, ROW: gl.constexpr, exist_M=None):
    """Begin to copy the rows at `base + offset_M` to shared memory `[M, D]`; zeros for rows that do not exist."""
    d = gl.arange(0, D, gl.SliceLayout(0, ROW))
    mask = None if exist_M is None else exist_M[:, None] & (d >= 0)[None, :]
    copy_to_shared(smem, base + offset_M[:, None] + d[None, :], mask)


@gluon.jit
def _places(tile, begin, end, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Return where the pairs of a tile are; places before the list repeat its first one."""
    return gl.maximum(end - (tile + 1) * M + gl.arange(0, M, LAYOUT), begin)


@gluon.jit
def pairs_of(pairs_ptr, tile, begin, end, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Load the pairs of a tile."""
    return gl.load(pairs_ptr + _places(tile, begin, end, M, LAYOUT))


@gluon.jit
def allocate_ring(RING: gl.constexpr, M: gl.constexpr):
    """Allocate room for the pairs of RING tiles, a power of two."""
    return gl.allocate_shared_memory(gl.int32, [RING, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def copy_pairs(ring, tile, pairs_ptr, begin, end):
    """Begin to copy the pairs of a tile to its place in the ring."""
    RING: gl.constexpr = ring.shape[0]
    M: gl.constexpr = ring.shape[1]
    at_M = _places(tile, begin, end, M, flat_layout(gl.num_warps()))
    copy_to_shared(ring.index(tile & (RING - 1)), pairs_ptr + at_M)


@gluon.jit
def pairs_in(ring, tile, LAYOUT: gl.constexpr):
    """Load the pairs of a tile from the ring."""
    RING: gl.constexpr = ring.shape[0]
    return ring.index(tile & (RING - 1)).load(LAYOUT)


@gluon.jit
def row_of(pair_M, head_rows, GROUP: gl.constexpr, PAST: gl.constexpr):
    """Return the flat query token, int64, and the head within the group, of each pair."""
    row_M = pair_M // PAST - head_rows
    return (row_M // GROUP).to(gl.int64), row_M % GROUP


@gluon.jit
def vectors_to(x, token_M, member_M):
    """Return how many vectors rows of x lie behind token 0 of the first head in their group.

    Heads of a group are within int32 (`attention._near`): a wider product would cost the loop registers.
    """
    return token_M * (x.token // VECTOR) + member_M * (x.head // VECTOR)
