"""What kernels take: structs of addresses and numbers, each with one meaning, so that a new argument is written once.

Triton compiles a kernel for properties of its arguments, members of structs included: whether a number is 1 or a
multiple of 16, and whether an address is a multiple of 16 bytes. Where that would compile too often, as for the first
head of a chunk, the argument stands alone, since `do_not_specialize` cannot name a member.

On the host an address is `TENSOR`, whose tensor every call gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.host.launch import TENSOR


class Rows(NamedTuple):
    """A tensor `[batch, token, head, width]`, contiguous in its width: its address, and strides in elements."""

    ptr: Any
    batch: int
    token: int
    head: int

    @classmethod
    def of(cls, strides: tuple[int, int, int]) -> Rows:
        """Return those of a tensor with these strides (`geometry.strides`)."""
        return cls(TENSOR, *strides)


class Table(NamedTuple):
    """A block table, int32 `[sequences, pages]`: its address, the stride of a sequence, and tokens of a page."""

    ptr: Any
    sequence: int
    page_size: int


class Packed(NamedTuple):
    """Sequences whose queries are packed and whose keys lie in pages.

    What a `Table` has, flat, since Triton 3.6 loses a 1 in a struct within a struct behind a `return`; then boundaries
    of the queries, and how many sequences.
    """

    ptr: Any
    sequence: int
    page_size: int
    cu_q: Any
    sequences: int


class Call(NamedTuple):
    """Where sequences and blocks lie; `tokens_q` and `tokens_k` as in `geometry.Geometry`.

    `rows` are those of one key/value head.
    """

    cu_q: Any
    cu_k: Any
    sequences: int
    tokens_q: int
    tokens_k: int
    block_size: int
    block_slots: int
    rows: int

    @classmethod
    def of(cls, geometry: Geometry) -> Call:
        """Return that of a call; the tensors are the boundaries of query and key sequences."""
        sizes = (geometry.sequences, geometry.tokens_q, geometry.tokens_k, geometry.block_size, geometry.block_slots)
        return cls(TENSOR, TENSOR, *sizes, geometry.rows)


class Lists(NamedTuple):
    """The pairs of all blocks, a list behind the other, and the items that programs work on (`plan`)."""

    pairs: Any
    items: Any


class Results(NamedTuple):
    """Output and log-sum-exp: of pairs, base 2, or of rows, natural."""

    out: Any
    lse: Any


class KeyGradients(NamedTuple):
    """Gradients of keys and values: parts of items, fp32, or the whole."""

    dk: Any
    dv: Any
