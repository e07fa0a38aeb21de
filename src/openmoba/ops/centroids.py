"""What a stored centroid is: a block's mean key, shifted and scaled so that 16 bits keep the ranking.

    c_n = 2^e * (mean of block n - anchor),   anchor = mean of the sequence's first min(block_size, 64) keys

Neither the shift (one vector for all blocks) nor the scale (a power of two) changes which blocks a query ranks highest.
The shift removes what all keys have in common, which would otherwise eat the precision of the differences between
blocks; the scale keeps fp16 far from overflow. Both come from the first block alone, which is in the past of every
query that has a past: later keys never change an earlier choice, not even in the last bit.

Prefill and the pages of a cache (`openmoba.ops.pages`) store the same. A block that is not complete has no centroid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmoba.config import check_blocks
from openmoba.ops.checks import check_cache

ANCHOR_KEYS = 64
ROOM = 0  # deviations from the anchor are scaled to 2^0: 2^16 to the largest fp16, 2^-14 to the smallest normal one
LARGEST_FP16 = 65504.0


def centroid_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the centroids of keys in `dtype` are stored in: fp16 for 16-bit keys, else the keys' dtype."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float16


def new_centroids(keys: Tensor, slots: int, block_size: int) -> Tensor:
    """Return undefined centroids `[B, slots // block_size, Hkv, D]` for a cache of keys like `keys`.

    Args:
        keys: `[B, any, Hkv, D]`, whose dtype and device count.
        slots: tokens that the cache has room for.
        block_size: tokens per page, >= 1.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_blocks(block_size, 1)
    check_cache("keys", keys, "[batch, slots, heads, dim]")
    batch, _, heads, width = keys.shape
    shape = (batch, heads, slots // block_size, width)
    # Head-major in memory, as the keys are: a head's pages lie side by side.
    return keys.new_empty(shape, dtype=centroid_dtype(keys.dtype)).transpose(1, 2)
