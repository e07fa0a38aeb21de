"""Where the rows of a batch lie in the cache: their blocks are counted from where they begin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmoba.hf.eager import eager, per_tensor
from openmoba.hf.masks import PADDING, has_holes

# B batch, S key slots


class Alignment(NamedTuple):
    """Where each row's tokens lie in the cache.

    Attributes:
        lengths: tokens of each row, int32 `[B]`.
        starts: first slot of each row, int32 `[B]`; None for rows without padding.
        first: the same on the host; None with a static cache, which the host does not look into.
    """

    lengths: Tensor
    starts: Tensor | None
    first: tuple[int, ...] | None


def aligned(batch: int, tokens: int, device: torch.device) -> Alignment:
    """Rows of `tokens` without padding."""
    return Alignment(torch.full((batch,), tokens, dtype=torch.int32, device=device), None, (0,) * batch)


def static_alignment(segment_map: Tensor) -> Alignment:
    """The alignment under a static cache, where padding is on the left."""
    # What layers share is remembered outside of graphs; a graph's compiler finds it itself.
    return _counted(segment_map) if torch.compiler.is_compiling() else _counted_once(segment_map)


def _counted(segment_map: Tensor) -> Alignment:
    lengths, starts = (x.sum((1, 2, 3), dtype=torch.int32) for x in (segment_map > PADDING, segment_map == PADDING))
    return Alignment(lengths, starts, None)


_counted_once = per_tensor(_counted)


@eager("whether padding is on the left decides which kernels run")
@per_tensor
def alignment_of(segment_map: Tensor) -> Alignment | None:
    """The alignment of left-padded rows of one sequence each, or None if the map says otherwise."""
    map_BS = segment_map[:, 0, 0]
    if bool(has_holes(map_BS) | (map_BS > 1).any()):
        return None
    alignment = _counted(segment_map)
    assert alignment.starts is not None
    return alignment._replace(first=tuple(alignment.starts.tolist()))
