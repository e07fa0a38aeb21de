"""What the cache layers have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

UNKNOWN = ("this cache was filled without key convolution, whose first keys it lacks", "start with an empty one")

# B batch, P pages, H key/value heads, D head width


class Pages(NamedTuple):
    """What `openmoba.ops.decode.moba_decode` reads besides keys and values.

    Attributes:
        centroids: of the cached keys, `[B, P, H, D]`.
        lengths: tokens of each row, int32 `[B]`.
        starts: first slot of each row, int32 `[B]`; None for zeros.
    """

    centroids: Tensor
    lengths: Tensor
    starts: Tensor | None


def head_major(pick: Callable[[Tensor], Tensor], x_BPHD: Tensor) -> Tensor:
    """Return `pick`'s rows, with a head's pages side by side in memory as they were."""
    return pick(x_BPHD.transpose(1, 2)).transpose(1, 2)
