"""Where the rows of a batch begin in the cache, which is where their blocks are counted from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from openmoba.hf.eager import eager, per_tensor
from openmoba.hf.masks import PADDING, has_holes

# B batch, S key slots


class Alignment(NamedTuple):
    """Where each row's tokens begin in the cache.

    Attributes:
        starts: first slot of each row, int32 `[B]`.
        first: the same on the host; None with a static cache, which the host does not look into.
    """

    starts: Tensor
    first: tuple[int, ...] | None

    def pick(self, pick: Callable[[Tensor], Tensor]) -> Alignment:
        """The rows that `pick` selects; the host looks at them only if they differ."""
        starts = pick(self.starts)
        if self.first is None:
            return Alignment(starts, None)
        same = len(set(self.first)) == 1
        return Alignment(starts, self.first[:1] * len(starts) if same else tuple(starts.tolist()))


def aligned(batch: int, device: torch.device) -> Alignment:
    """Rows without padding."""
    return Alignment(torch.zeros(batch, dtype=torch.int32, device=device), (0,) * batch)


def static_alignment(segment_map: Tensor) -> Alignment:
    """The alignment under a static cache, where padding is on the left."""
    return Alignment((segment_map == PADDING).sum((1, 2, 3), dtype=torch.int32), None)


@eager("whether padding is on the left decides which kernels run")
@per_tensor
def alignment_of(segment_map: Tensor) -> Alignment | None:
    """The alignment of left-padded rows of one sequence each, or None if the map says otherwise."""
    map_BS = segment_map[:, 0, 0]
    if bool(has_holes(map_BS) | (map_BS > 1).any()):
        return None
    starts = (map_BS == PADDING).sum(1, dtype=torch.int32)
    return Alignment(starts, tuple(starts.tolist()))
