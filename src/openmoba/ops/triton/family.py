"""What a family of kernels is: the six steps of attention, each as a kernel to launch.

    attend_past            one partial result per pair               forward
    attend_own             the own block, merged with the partials   forward
    key_gradients          dK and dV per item of past rows           backward, and shares of dQ (`keys_per_share`)
    query_gradients        dQ per pair, where there are no shares    backward
    own_key_gradients      the own block's, and all parts summed     backward
    own_query_gradients    the own block's, and all parts summed     backward

A family is a folder that makes one of these, and one line in `families`. All take the same arguments in the same order
and write the same results, so that one can take another's place in any step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from openmoba.ops.triton.geometry import Geometry, power_of_two


@dataclass(frozen=True)
class Tile:
    """One kernel's configuration, a line of a family's tuning table.

    Attributes:
        m: rows per tile.
        n: keys per tile.
        d: head width, padded.
        warps: of a program.
        stages: buffers of the loop over tiles.
        segment: the most pairs per item, of kernels that work on items.
        registers: the most per thread; None: as many as the compiler likes.
    """

    m: int
    n: int
    d: int
    warps: int
    stages: int
    segment: int = 0
    registers: int | None = None


class Kernel(NamedTuple):
    """What to launch: a compiled function, the tile that its grid is made of, and its keyword arguments."""

    function: Any
    tile: Tile
    constants: dict[str, Any]


def called(name: str) -> Callable[[Any], str]:
    """Return the `repr` of a kernel that profiles and compilers call so: kernels of several families are namesakes."""
    return lambda _: name


Make = Callable[[Geometry, torch.dtype], Kernel]


@dataclass(frozen=True, eq=False)
class Family:
    """The kernels of one family, step by step.

    Attributes:
        name: as `openmoba.explain` calls it.
        why_not: of a call's geometry and tensors, why these kernels cannot be used for them, or None.
    """

    name: str
    why_not: Callable[..., str | None]
    attend_past: Make
    attend_own: Make
    key_gradients: Make
    query_gradients: Make
    own_key_gradients: Make
    own_query_gradients: Make


def keys_per_share(geometry: Geometry, dtype: torch.dtype) -> int:
    """Return how many keys of a block `key_gradients` works on at once, each time making one share of dQ per pair.

    All families do this alike: memory is planned before one is picked, and for both passes.
    """
    keys = padded_keys(geometry)
    if dtype == torch.float32:
        return float32_side(geometry)
    return min(64 if geometry.padded_width > 128 else 128, keys)


def pairs_per_item(geometry: Geometry) -> int:
    """Return the most pairs of an item of `key_gradients`; alike in all families, since its partials take memory.

    Each item has fp32 partials of its whole block: with 8 pairs per key they take half as much as bf16 shares of dQ.
    """
    return max(4096, 8 * padded_keys(geometry))


def padded_keys(geometry: Geometry) -> int:
    """Return the keys of a block as a tile holds them: a power of two, and enough for a matrix instruction."""
    return power_of_two(max(16, geometry.block_size))


def float32_side(geometry: Geometry) -> int:
    """Return the rows and keys per tile in fp32, whose products keep their operands in registers."""
    return min(32 if geometry.padded_width <= 64 else 16, padded_keys(geometry))
