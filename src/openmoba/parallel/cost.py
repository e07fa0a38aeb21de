"""What crosses between the ranks, and the rule that picks a way.

    H query heads, G = H / Hkv of them share keys, r = N / gcd(N, Hkv) copies of keys that N ranks need, D head width

Values that each rank sends per token of the whole sequence:

    heads   forward   2 (H + r Hkv) D / N x (N - 1) / N      queries, keys, values there; outputs back
            backward  the same
    keys    forward   2 Hkv D (N - 1) / N                    keys and values of every other rank
            backward  twice that                             keys and values again, then their gradients
"""

from __future__ import annotations

from math import gcd

WAYS = ("auto", "heads", "keys")


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
    """Return the way that sends less in both passes: "heads" where `2 (G + r) <= 3 N` and N divides H, else "keys".

    So "heads" for G = 1 from two ranks on, for G = 4 from four on, for G = 8 from eight on.
    """
    if heads % ranks:
        return "keys"
    by_heads, by_keys = (values_sent(way, heads, kv_heads, ranks) for way in ("heads", "keys"))
    return "heads" if by_heads <= by_keys else "keys"
