"""Pages of a key cache: one centroid per complete block, computed once, when its last key arrives.

    c_p = 2^e * (mean of page p's keys - anchor),   anchor = mean of the row's first min(block_size, 64) keys

A page is a block: page p of row b covers the cache slots `starts[b] + p * block_size` and following, so that blocks
begin at the row's first real token whatever padding precedes it. These are the centroids that prefill chooses by
(`openmoba.ops.triton.pool` says why they are shifted and scaled): fp16 for 16-bit keys, fp32 and fp64 for such keys.
An incomplete page has none, and nobody scores it. Since a centroid depends on the cached keys alone, the pages are the
same however the cache was filled.

Nothing here waits for the device, so it runs in CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmoba.ops.library import device_of, is_plain

ANCHOR_KEYS = 64
ROOM = 4  # deviations from the anchor are scaled to 2^4, leaving 2^12 to the largest fp16
LARGEST_FP16 = 65504.0

# B batch rows, S cache slots, P pages, N pages that may be complete, K slots of a page, A keys of the anchor,
# H key/value heads, D head width


def centroid_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the centroids of keys in `dtype` are kept in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float16


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over numbers of `dtype` are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_centroids(keys_BSHD: Tensor, slots: int, block_size: int) -> Tensor:
    """Undefined centroids `[B, slots // block_size, H, D]` of keys like these."""
    batch, _, heads, width = keys_BSHD.shape
    shape = (batch, heads, slots // block_size, width)
    # Head-major in memory, as the keys are: a head's pages lie side by side.
    return torch.empty(shape, dtype=centroid_dtype(keys_BSHD.dtype), device=keys_BSHD.device).transpose(1, 2)


def complete_pages(
    centroids: Tensor, keys: Tensor, lengths: Tensor, starts: Tensor | None, new: int, block_size: int
) -> None:
    """Write the centroids of the pages that each row's last `new` tokens completed.

    That is page p where `lengths - new < (p + 1) * block_size <= lengths`. It reads a key per token on average.

    Args:
        centroids: `[B, P, H, D]`, any strides, in `centroid_dtype` of the keys.
        keys: the cache `[B, S, H, D]`, any strides, the new tokens' keys already written.
        lengths: int32 `[B]`, tokens in the cache, the new ones included; not read by the host.
        starts: int32 `[B]`, first slot of each row; None for zeros.
        new: any number of tokens; more than there are completes all pages.
        block_size: tokens per page.

    Raises:
        ValueError: naming the argument and its value.
    """
    wanted = (keys.shape[0], *keys.shape[2:])
    if (centroids.shape[0], *centroids.shape[2:]) != wanted or centroids.dtype != centroid_dtype(keys.dtype):
        raise ValueError(
            f"centroids must be {centroid_dtype(keys.dtype)} [{wanted[0]}, pages, {wanted[1]}, {wanted[2]}], "
            f"got {centroids.dtype} {tuple(centroids.shape)}; openmoba.ops.pages.new_centroids makes them"
        )
    arguments = (centroids, keys, lengths, starts, new, block_size)
    on_device = keys.is_cuda and keys.dtype != torch.float64
    if on_device and is_plain(centroids, keys, lengths):  # dispatch would take as long as the kernel
        _complete_on_device(*arguments)
        return
    with torch.no_grad():
        (torch.ops.openmoba.triton_complete_pages if on_device else _complete_in_torch)(*arguments)


def _complete_on_device(
    centroids: Tensor, keys: Tensor, lengths: Tensor, starts: Tensor | None, new: int, block_size: int
) -> None:
    from openmoba.ops.triton import pages  # importing openmoba needs torch alone

    with device_of(keys):
        pages.complete_pages(centroids, keys, lengths, starts, new, block_size)


_complete_op = torch.library.custom_op(
    "openmoba::triton_complete_pages", _complete_on_device, mutates_args=("centroids",)
)


@_complete_op.register_fake
def _fake_complete_pages(*_: object) -> None:
    return None


def _complete_in_torch(
    centroid_BPHD: Tensor, key_BSHD: Tensor, length_B: Tensor, start_B: Tensor | None, new: int, block_size: int
) -> None:
    batch, pages, heads, width = centroid_BPHD.shape
    possible = min(pages, -(-new // block_size))
    if possible == 0:
        return
    start_B = torch.zeros_like(length_B) if start_B is None else start_B
    before_B1 = (length_B - new).clamp(min=0)[:, None]
    first_B1 = (before_B1 // block_size).clamp(max=pages - possible)
    page_BN = first_B1 + torch.arange(possible, device=key_BSHD.device)
    end_BN = (page_BN + 1) * block_size
    done_BN = (end_BN > before_B1) & (end_BN <= length_B[:, None])

    wide = accumulation_dtype(key_BSHD.dtype)
    anchor_keys = torch.arange(min(ANCHOR_KEYS, block_size), device=key_BSHD.device)
    first_BAHD = _at(key_BSHD, start_B, anchor_keys.expand(batch, -1)).to(wide)
    anchor_B1HD = first_BAHD.mean(1, keepdim=True)
    spread_BH = (first_BAHD - anchor_B1HD).abs().amax((1, 3))
    scale_BH = _power_of_two(torch.maximum(spread_BH, anchor_B1HD.abs().amax((1, 3)) / 64))

    position_BNK = page_BN[..., None] * block_size + torch.arange(block_size, device=key_BSHD.device)
    key_BNKHD = _at(key_BSHD, start_B, position_BNK.flatten(1)).view(batch, possible, block_size, heads, width)
    centroid_BNHD = (key_BNKHD.to(wide).mean(2) - anchor_B1HD) * scale_BH[:, None, :, None]
    if centroid_BPHD.dtype == torch.float16:
        centroid_BNHD = centroid_BNHD.clamp(-LARGEST_FP16, LARGEST_FP16)
    index = page_BN.long()[..., None, None].expand(-1, -1, heads, width)
    known_BNHD = centroid_BPHD.gather(1, index)
    chosen_BNHD = torch.where(done_BN[..., None, None], centroid_BNHD.to(centroid_BPHD.dtype), known_BNHD)
    centroid_BPHD.scatter_(1, index, chosen_BNHD)


def _at(key_BSHD: Tensor, start_B: Tensor, position_BN: Tensor) -> Tensor:
    """Keys `[B, N, H, D]` at positions within the rows; anything beyond the cache."""
    slot_BN = (start_B[:, None] + position_BN).clamp(max=key_BSHD.shape[1] - 1).long()
    return key_BSHD[torch.arange(start_B.shape[0], device=key_BSHD.device)[:, None], slot_BN]


def _power_of_two(x: Tensor) -> Tensor:
    """The powers of two that take x > 0 into [2^4, 2^5); 1 for 0."""
    exponent = (ROOM + 1 - torch.frexp(x).exponent).clamp(-126, 127).to(x.dtype)  # else powers are of the default dtype
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent), 1.0)
