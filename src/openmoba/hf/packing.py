"""From padded or packed batches to packed sequences, and back.

A plan depends on the segment map alone, which all layers of a forward pass share, so it is made once for each map
and kept as long as that lives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmoba.hf.eager import eager, per_tensor
from openmoba.hf.masks import UNWRITTEN

# B batch, T queries per row, S key slots per row, N tokens kept of all rows, H heads, D head width


class Packing(NamedTuple):
    """Where the sequences of a batch are.

    Attributes:
        queries: position `row * T + query` of every real query, sequence by sequence, int64.
        keys: position `row * S + slot` of every real key, int64.
        cu_q, cu_k: where each sequence starts in the two, int32 `[sequences + 1]`.
    """

    queries: Tensor
    keys: Tensor
    cu_q: Tensor
    cu_k: Tensor


@eager("the number of real tokens is a property of the data")
@per_tensor
def packing_of(segment_map: Tensor, queries: int) -> Packing:
    """The plan for a segment map `[B, 1, 1, S]` whose last `queries` written slots are the queries."""
    map_BS = segment_map[:, 0, 0]
    written = int((map_BS[0] != UNWRITTEN).sum())
    query_map_BT = map_BS[:, written - queries : written]
    # A sequence of the batch is a pair (row, number within the row); flattening keeps pairs in order.
    stride = int(map_BS.max()) + 1
    row_B1 = torch.arange(map_BS.shape[0], device=map_BS.device)[:, None]
    key_N, query_N = ((m > 0).flatten().nonzero()[:, 0] for m in (map_BS, query_map_BT))
    key_of_N, query_of_N = (
        (row_B1 * stride + m).flatten()[index].contiguous() for m, index in ((map_BS, key_N), (query_map_BT, query_N))
    )
    sequences = torch.unique_consecutive(key_of_N)
    return Packing(query_N, key_N, _boundaries(query_of_N, sequences), _boundaries(key_of_N, sequences))


def take(x_BTHD: Tensor, index_N: Tensor) -> Tensor:
    """The tokens at `index_N`, `[N, H, D]`."""
    return x_BTHD.flatten(0, 1).index_select(0, index_N)


def put_back(x_NHD: Tensor, index_N: Tensor, batch: int, tokens: int) -> Tensor:
    """Inverse of `take`, `[B, T, H, D]`; padding becomes zero."""
    out = x_NHD.new_zeros(batch * tokens, *x_NHD.shape[1:])
    return out.index_copy(0, index_N, x_NHD).view(batch, tokens, *x_NHD.shape[1:])


def _boundaries(sequence_N: Tensor, sequences: Tensor) -> Tensor:
    """Start of each of `sequences` in the sorted `sequence_N`, then its length: int32."""
    starts = torch.searchsorted(sequence_N, sequences)
    return torch.nn.functional.pad(starts, (0, 1), value=sequence_N.numel()).int()
