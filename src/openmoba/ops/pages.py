"""Pages of a key cache: one centroid per complete block, computed once, when its last key arrives.

A page is a block: page p of row b covers the cache slots `starts[b] + p * block_size` and following, so that blocks
begin at the row's first real token whatever padding precedes it. An incomplete page has no centroid
(`openmoba.ops.centroids`), and nobody scores it. Since a centroid depends on the cached keys alone, the pages are the
same however the cache was filled.

Nothing here waits for the device, so it runs in CUDA graphs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from openmoba.config import check_blocks
from openmoba.limits import check_count
from openmoba.ops.arguments import KeyCache
from openmoba.ops.backends import DECODERS, Decoder, decoder, implementation
from openmoba.ops.centroids import centroid_dtype
from openmoba.ops.checks import check_cache, check_rows, check_tensors, is_traced
from openmoba.ops.operation import operation
from openmoba.ops.reference import reference_complete_pages


@operation(Decoder.complete_pages, fake=lambda *_: None, mutates=("centroids",))
def write_pages(name: str, *arguments: Any) -> None:
    """Write the centroids of complete pages."""
    decoder(name).complete_pages(*arguments)


def check_row_values(lengths: Tensor, starts: Tensor | None, slots: int) -> int:
    """Return the most tokens of a row, 0 where the host does not look: on devices, under tracers and transforms.

    Raises:
        ValueError: a row does not lie within the slots of its cache.
    """
    if is_traced() or lengths.device.type != "cpu" or type(lengths) is not Tensor or lengths.numel() == 0:
        return 0
    ends = lengths if starts is None else starts + lengths
    wrong = (lengths < 0) | (ends > slots) | (ends < lengths)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        first = 0 if starts is None else int(starts[row])
        raise ValueError(
            f"row {row} has {int(lengths[row])} tokens from slot {first} on in a cache of {slots} slots; lengths count "
            "the tokens of a row, and starts are their first slots"
        )
    return int(lengths.max())


def complete_pages(
    centroids: Tensor, keys: Tensor, lengths: Tensor, starts: Tensor | None, new: int, block_size: int
) -> None:
    """Write the centroids of the pages that each row's last `new` tokens completed.

    That is page p where `lengths - new < (p + 1) * block_size <= lengths`. It reads a key per token on average.

    Args:
        centroids: `[B, P, H, D]`, any strides, as `openmoba.new_centroids` makes them.
        keys: the cache `[B, S, H, D]`, any strides, the new tokens' keys already written.
        lengths: int32 `[B]`, tokens in the cache, the new ones included; on CUDA not read by the host.
        starts: int32 `[B]`, first slot of each row; None for zeros.
        new: any number of tokens; more than there are completes all pages.
        block_size: tokens per page.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_blocks(block_size, 1)
    check_count("new", new, 0)
    check_tensors(centroids=centroids, keys=keys)
    check_cache("keys", keys, "[batch, slots, heads, dim]")
    wanted = (keys.shape[0], *keys.shape[2:])
    if (*centroids.shape[:1], *centroids.shape[2:]) != wanted or centroids.dtype != centroid_dtype(keys.dtype):
        raise ValueError(
            f"centroids must be {centroid_dtype(keys.dtype)} [{wanted[0]}, pages, {wanted[1]}, {wanted[2]}], "
            f"got {centroids.dtype} {tuple(centroids.shape)}; openmoba.new_centroids makes them"
        )
    if centroids.device != keys.device:
        raise ValueError(f"centroids must be on the cache's device {keys.device}, got {centroids.device}")
    check_rows(lengths, starts, keys)
    check_row_values(lengths, starts, keys.shape[1])
    cache = KeyCache(centroids, keys, lengths, starts, block_size)
    name, _ = implementation(keys, "auto", DECODERS)
    if name == "reference":
        reference_complete_pages(cache, new)
    else:
        write_pages(name, cache, new)
