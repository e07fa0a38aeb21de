"""What crosses between the ranks, and the rule that picks a way.

    H query heads, G = H / Hkv of them share keys, r = N / gcd(N, Hkv) copies of keys that N ranks need, D head width

Values that each rank sends per token of the whole sequence:

    heads   forward   2 (H + r Hkv) D / N x (N - 1) / N      queries, keys, values there; outputs back
            backward  the same
    keys    forward   2 Hkv D (N - 1) / N                    keys and values of every other rank
            backward  twice that                             keys and values again, then their gradients
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

WAYS = ("auto", "heads", "keys")
BYTES_PER_TURN = 1 << 28
"""Of what a turn brings to a rank, where more than one key/value head fits into it."""


@dataclass(frozen=True)
class Call:
    """One attention of one device, as it was measured, to be spread over several.

    Attributes:
        tokens: of the whole sequence.
        seconds: of both passes on one device.
        heads, kv_heads, head_dim: H, Hkv and D.
        itemsize: bytes of a value.
    """

    tokens: int
    seconds: float
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2


def predicted_seconds(way: str, call: Call, ranks: int, bandwidth: float) -> float:
    """Estimate both passes over several devices: their share of the computation, and what of transfers it cannot hide.

    The first turn's way there and the last turn's way back stand alone, and of the others what takes longer than
    computing. Shards are balanced. Copies between layouts are not counted.

    Args:
        way: "heads" or "keys".
        bandwidth: bytes a second that a device sends, measured: `gb_per_second` of `openmoba bench parallel`.
    """
    values = values_sent(way, call.heads, call.kv_heads, ranks) * call.head_dim * call.tokens
    computing, sending = call.seconds / ranks, values * call.itemsize / bandwidth
    turn = sending / _turns(way, call, ranks)
    return max(computing, sending - turn) + turn


def _turns(way: str, call: Call, ranks: int) -> int:
    """Return in how many turns of key/value heads a call goes."""
    of_head = call.tokens * call.head_dim * call.itemsize
    if way == "keys":
        return call.kv_heads // heads_per_turn(call.kv_heads, 2 * of_head)
    own = call.kv_heads * key_copies(call.kv_heads, ranks) // ranks
    return own // heads_per_turn(own, (call.heads // ranks // own + 2) * of_head)


def heads_per_turn(kv_heads: int, bytes_of_one: int) -> int:
    """Return the largest divisor of the key/value heads that bring `BYTES_PER_TURN` at most, or 1."""
    fitting = (n for n in range(kv_heads, 1, -1) if kv_heads % n == 0 and n * bytes_of_one <= BYTES_PER_TURN)
    return next(fitting, 1)


def key_copies(kv_heads: int, ranks: int) -> int:
    """Return how many copies of each key/value head spread evenly over the ranks: 1 where ranks divide the heads."""
    return ranks // gcd(ranks, kv_heads)


def values_sent(way: str, heads: int, kv_heads: int, ranks: int, *, backward: bool = True) -> float:
    """Return how many values a rank sends per token of the whole sequence and per unit of head width.

    Args:
        way: "heads" or "keys".
        backward: count the backward pass as well.
    """
    others = (ranks - 1) / ranks
    if way == "heads":
        return 2 * (heads + key_copies(kv_heads, ranks) * kv_heads) / ranks * others * (2 if backward else 1)
    return 2 * kv_heads * others * (3 if backward else 1)


def choose_way(heads: int, kv_heads: int, ranks: int) -> str:
    """Return "heads" where N divides Hkv, else what sends less in both passes, of what is possible.

    Where N divides Hkv, "heads" is exact bit for bit, copies less, and was the faster one over two GPUs joined by
    NVLink, though for G = 4 it sends 1.67 times the bytes. Elsewhere it repeats keys, and needs N to divide H.
    """
    if kv_heads % ranks == 0:
        return "heads"
    if heads % ranks:
        return "keys"
    by_heads, by_keys = (values_sent(way, heads, kv_heads, ranks) for way in ("heads", "keys"))
    return "heads" if by_heads <= by_keys else "keys"


def crossover(call: Call, ranks: int) -> float | None:
    """Return the bandwidth at which both ways take as long, found by halving; None if one is faster at any.

    Below it, what sends less is faster; above it, what leaves less for the first and the last turn.
    """

    def keys_gain(bandwidth: float) -> float:
        by_heads, by_keys = (predicted_seconds(way, call, ranks, bandwidth) for way in ("heads", "keys"))
        return by_heads - by_keys

    low, high = 1.0, 1e15
    if (keys_gain(low) > 0) == (keys_gain(high) > 0):
        return None
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if keys_gain(middle) > 0 else (middle, high)
    return high
