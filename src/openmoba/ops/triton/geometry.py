"""Where things are: sequences, tiles and blocks of a batched or packed call, on the host and in kernels.

A packed batch is cut into tiles without reading its lengths on the host. Sequence s, which starts at `cu[s]`,
owns the tile slots from `cu[s] // tile + s` on. Since `b//t - a//t + 1 >= ceil((b-a) / t)`, that is room for all
its tiles, so `total // tile + sequences` tile slots serve any lengths; a few stay empty and their programs return at
once. Key blocks are numbered by the same rule with `tile = block_size`; such a number is called a *block slot*.
A batch of equal lengths is cut evenly and has none that is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.host.launch import REMEMBERED

_WHOLE = 128
"""Keys; of a block that holds all keys of a call, the length is rounded up to it, so that whole tiles serve it."""


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; Triton's own is several times slower on the host, which counts at short lengths."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


def kernel_width(width: int) -> int:
    """Return a head width as the kernels see it: a power of two, and enough for a matrix instruction."""
    return max(16, power_of_two(width))


class Paging(NamedTuple):
    """A block table: the stride of a sequence, and tokens of a page."""

    stride: int
    page_size: int


class Heads(NamedTuple):
    """How many heads there are, of queries and of keys and values, and their width."""

    query: int
    key_value: int
    width: int


@dataclass(frozen=True, eq=False)
class Geometry:
    """Sizes of one call.

    Attributes:
        packed: whether all sequences lie behind one another, in one row of the batch.
        tokens_q, tokens_k: of a row of the batch; of keys in pages, what the block table has room for.
        paging: where a block table says that keys lie; None for keys side by side.
    """

    packed: bool
    sequences: int
    tokens_q: int
    tokens_k: int
    shape: Heads
    block_size: int
    top_k: int
    paging: Paging | None = None

    @staticmethod
    def of(q: Tensor, k: Tensor, cu_q: Tensor | None, block_size: int, top_k: int) -> Geometry:
        """Return that of a call; its lengths may be symbols of a compiler."""
        return _of_sizes(*_sizes(q, k, cu_q, block_size, top_k))

    @staticmethod
    def shared(q: Tensor, k: Tensor, cu_q: Tensor | None, block_size: int, top_k: int) -> Geometry:
        """Return the same for lengths that are numbers: one object per shape, found by its identity in caches."""
        return _shared(*_sizes(q, k, cu_q, block_size, top_k))

    @cached_property
    def heads(self) -> int:
        """Return the query heads."""
        return self.shape.query

    @cached_property
    def kv_heads(self) -> int:
        """Return the key/value heads."""
        return self.shape.key_value

    @cached_property
    def width(self) -> int:
        """Return the head width."""
        return self.shape.width

    @property
    def split(self) -> int:
        """Return the tokens of a page where blocks lie in several pages; else 0."""
        if self.paging is None or self.paging.page_size >= self.block_size:
            return 0
        return self.paging.page_size

    @cached_property
    def group(self) -> int:
        """Return the query heads per key/value head."""
        return self.heads // self.kv_heads

    @cached_property
    def query_tokens(self) -> int:
        """Return the query tokens of all sequences."""
        return self.tokens_q if self.packed else self.sequences * self.tokens_q

    @cached_property
    def rows(self) -> int:
        """Return the rows, (query token, query head), of one key/value head."""
        return self.query_tokens * self.group

    @cached_property
    def pairs(self) -> int:
        """Return the most pairs of (query token, query head) and past block that one key/value head can have."""
        return self.rows * (self.top_k - 1)

    @cached_property
    def longest(self) -> int:
        """Return an upper bound of the blocks in one sequence."""
        of_pages = self.paging is not None  # a block table has as much room for each sequence
        return cdiv(self.tokens_k // self.sequences if of_pages else self.tokens_k, self.block_size)

    @cached_property
    def padded_width(self) -> int:
        """Return the head width as the kernels see it."""
        return kernel_width(self.width)

    @cached_property
    def block_slots(self) -> int:
        """Return the block slots per key/value head."""
        return self._tile_slots(self.tokens_k, self.block_size)

    def query_tile_slots(self, tile: int) -> int:
        """Return the tile slots for tiles of `tile` query tokens."""
        return self._tile_slots(self.tokens_q, tile)

    def own_block_slots(self, tokens: range) -> range:
        """Return the block slots that hold these query tokens of all sequences; perhaps more in a packed batch."""
        if self.packed:
            return range(self.block_slots)
        return range(self._own_block_slot(tokens[0]), self._own_block_slot(tokens[-1]) + 1)

    def _own_block_slot(self, token: int) -> int:
        sequence, query = divmod(token, self.tokens_q)
        return sequence * self.longest + (query + self.tokens_k - self.tokens_q) // self.block_size

    def _tile_slots(self, tokens: int, tile: int) -> int:
        if self.packed:
            return tokens // tile + self.sequences
        return self.sequences * cdiv(tokens, tile)


@lru_cache(maxsize=REMEMBERED)
def _shared(*sizes: Any) -> Geometry:
    return _of_sizes(*sizes)


def _of_sizes(
    packed: bool, sequences: int, tokens_q: int, tokens_k: int, heads: Heads, block_size: int, top_k: int
) -> Geometry:
    # A block larger than all keys holds no more of them, and would have programs for tokens that there are not.
    block_size = torch.sym_min(block_size, cdiv(tokens_k, _WHOLE) * _WHOLE)
    return Geometry(packed, sequences, tokens_q, tokens_k, heads, block_size, top_k)


def _sizes(q: Tensor, k: Tensor, cu_q: Tensor | None, block_size: int, top_k: int) -> tuple[Any, ...]:
    sequences = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    heads = Heads(q.shape[-2], k.shape[-2], q.shape[-1])
    return cu_q is not None, sequences, q.shape[-3], k.shape[-3], heads, block_size, top_k


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch (0 when packed), token and head; the last dimension is contiguous."""
    *batch, token, head, last = x.stride()
    assert last == 1 or x.shape[-1] == 1
    return (batch[0] if batch else 0, token, head)


@triton.jit
def locate(tile_slot, cu_ptr, sequences, tokens, tile, PACKED: tl.constexpr):
    """Return the sequence that owns a tile slot, and the tile's number within it."""
    if PACKED:
        low = 0
        high = sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(cu_ptr + middle) // tile + middle <= tile_slot:
                low = middle
            else:
                high = middle - 1
        first = tl.load(cu_ptr + low) // tile + low
        return low, tile_slot - first
    else:
        tiles = tl.cdiv(tokens, tile)
        return tile_slot // tiles, tile_slot % tiles


@triton.jit
def span(sequence, cu_ptr, tokens, PACKED: tl.constexpr):
    """Return the first token of a sequence within its batch row, and its token count."""
    if PACKED:
        begin = tl.load(cu_ptr + sequence)
        return begin, tl.load(cu_ptr + sequence + 1) - begin
    else:
        return 0, tokens


@triton.jit
def sequence_of(flat_M, call, PACKED: tl.constexpr):
    """Return the sequence of each flat query token."""
    if PACKED:
        low_M = tl.zeros_like(flat_M)
        high_M = low_M + call.sequences - 1
        remaining = call.sequences
        while remaining > 0:
            middle_M = (low_M + high_M + 1) // 2
            reached_M = tl.load(call.cu_q + middle_M) <= flat_M
            low_M = tl.where(reached_M, middle_M, low_M)
            high_M = tl.where(reached_M, high_M, tl.maximum(middle_M - 1, 0))
            remaining = remaining // 2
        return low_M
    else:
        return flat_M // call.tokens_q


@triton.jit
def first_tile_slot(sequence, cu_ptr, tokens, tile, PACKED: tl.constexpr):
    """Return the first tile slot of a sequence."""
    if PACKED:
        return tl.load(cu_ptr + sequence) // tile + sequence
    else:
        return sequence * tl.cdiv(tokens, tile)


@triton.jit
def first_row(sequence, call, PACKED: tl.constexpr):
    """Return the number of a sequence's first query token among the query tokens of all sequences."""
    if PACKED:
        return tl.load(call.cu_q + sequence)
    else:
        return sequence * call.tokens_q


@triton.jit
def query_base(q, kv_head, sequence, call, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """Return where flat query token 0 would lie, in the first head of a group.

    Flat token numbers run over all sequences; in a batch they are counted back into their batch row.
    """
    base = q.ptr + kv_head.to(tl.int64) * GROUP * q.head
    if not PACKED:
        base += sequence.to(tl.int64) * (q.batch - tl.cast(call.tokens_q, tl.int64) * q.token)
    return base
