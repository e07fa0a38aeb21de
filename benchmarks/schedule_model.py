"""How long a launch takes whose programs differ in length: list scheduling on the multiprocessors of an H100.

    python benchmarks/schedule_model.py > results/h100/tuning/16-schedule-model.txt

Every multiprocessor takes the next program when it is done. A program takes a fixed time and a time per tile of 64
rows, chosen to agree with results/h100/tuning, files 13 to 15. Times are microseconds of one launch; 32 query heads, 8
key/value heads.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MULTIPROCESSORS = 132
GROUP = 4  # query heads per key/value head
ROWS = 64  # per tile
SEGMENT = 4096  # pairs per item
PIECE = 128  # keys per program
ITEM_US, ITEM_TILE_US = 4.0, 2.55  # key gradients
OWN_US, OWN_TILE_US = 6.0, 2.0  # own key gradients
SORTED = (0, 32, 64, 128, 256, 512, 10**6)  # lists whose items come longest first
TOGETHER = (1, 16, 32, 64)  # blocks whose first pieces come first


class Shape(NamedTuple):
    """One launch."""

    batch: int
    tokens: int
    block_size: int
    top_k: int
    heads: int  # key/value heads at once


SHAPES = (
    Shape(4, 1024, 128, 8, 8),
    Shape(4, 2048, 128, 8, 8),
    Shape(4, 2048, 512, 3, 8),
    Shape(4, 4096, 128, 8, 4),
    Shape(4, 4096, 512, 3, 8),
    Shape(1, 8192, 128, 8, 8),
    Shape(1, 8192, 512, 3, 8),
    Shape(1, 32768, 128, 8, 3),
    Shape(1, 32768, 512, 3, 4),
    Shape(1, 131072, 128, 8, 1),
    Shape(1, 131072, 512, 3, 1),
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("key gradients, the items of the last N lists longest first; work: all programs over all multiprocessors")
    print(f"{'shape':28}{'work':>7}" + "".join(f"{'N all' if n > 10**5 else f'N {n}':>8}" for n in SORTED))
    for shape in SHAPES:
        items = items_of(shape)
        times = [makespan(key_gradients(items, shape, longest_first)) for longest_first in SORTED]
        print(line(shape, key_gradients(items, shape, 0), times))
    print("\nown key gradients, all first pieces of N neighbouring blocks before all second ones")
    print(f"{'shape':28}{'work':>7}" + "".join(f"{f'N {n}':>8}" for n in TOGETHER))
    for shape in SHAPES:
        if shape.block_size > PIECE:
            times = [makespan(own_key_gradients(shape, together)) for together in TOGETHER]
            print(line(shape, own_key_gradients(shape, 1), times))


def line(shape: Shape, costs: Sequence[float], times: Sequence[float]) -> str:
    """Write one row of a table."""
    name = f"{shape.batch} x {shape.tokens}, {shape.block_size} / {shape.top_k}, {shape.heads} heads"
    return f"{name:28}{sum(costs) / MULTIPROCESSORS:7.0f}" + "".join(f"{time:8.0f}" for time in times)


def makespan(costs: Iterable[float]) -> float:
    """Return when the last program ends, if they start in this order."""
    free = [0.0] * MULTIPROCESSORS
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def items_of(shape: Shape) -> list[tuple[int, int]]:
    """Return list and pairs of every item. Every query chooses evenly among its past blocks; lists scatter by 7 %."""
    blocks = shape.tokens // shape.block_size
    expected = [0.0] * blocks
    for block in range(1, blocks):
        for past in range(block):
            expected[past] += shape.block_size * GROUP * min(block, shape.top_k - 1) / block
    scatter = random.Random(0)
    items = []
    for number in range(shape.heads * shape.batch * blocks):
        pairs = int(expected[number % blocks] * scatter.uniform(0.93, 1.07))
        items += [(number, min(SEGMENT, pairs - begin)) for begin in range(0, pairs, SEGMENT)]
    return items


def key_gradients(items: Sequence[tuple[int, int]], shape: Shape, longest_first: int) -> list[float]:
    """Return the times of all programs in the order in which they start."""
    first_sorted = shape.heads * shape.batch * shape.tokens // shape.block_size - longest_first
    ordered = sorted(items, key=lambda item: -item[1] if item[0] >= first_sorted else -SEGMENT - 1)
    pieces = shape.block_size // PIECE
    return [ITEM_US + ITEM_TILE_US * -(-pairs // ROWS) for _, pairs in ordered for _ in range(pieces)]


def own_key_gradients(shape: Shape, together: int) -> list[float]:
    """Return the times for the blocks' own queries; the first piece of a block has all its rows."""
    pieces = shape.block_size // PIECE
    slots = shape.batch * shape.tokens // shape.block_size
    costs = []
    for _ in range(shape.heads):
        for first in range(0, slots, together):
            here = min(together, slots - first)
            for piece in range(pieces):
                tiles = (shape.block_size - piece * PIECE) // ROWS * GROUP
                costs += [OWN_US + OWN_TILE_US * tiles] * here
    return costs


if __name__ == "__main__":
    main()
