"""Key convolution over a block table: the keys before a sequence's new tokens lie with the pages of its cache.

A convolution of width W needs the W - 1 raw keys before each new token. Those of a page's last tokens are kept in a
tensor of the same order as the pages, token t in slot t % (W - 1) of its page: the next tokens overwrite the oldest,
and a full page holds its own last ones. So they are shared, evicted and written anew with their page, as centroids
are, and a server need not know of them.

Sequences that begin alike share full pages, maybe in the step that writes them: a sequence whose new tokens begin with
a page reads after the batch is written. One whose new tokens begin within a page, which is its own, reads before its
later tokens take the place of the earlier ones.

On CUDA kernels do it (`openmoba.ops.triton.raw_keys`). Elsewhere torch operations do, which are their specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openmoba.ops.key_conv import key_convolution

# Z pages of the cache, P tokens of a page, B sequences, M pages of a sequence in the table, N new tokens of all
# sequences, W width of the convolution, R = W - 1 keys before a token, C channels of all key heads


def new_raw_keys(pages: int, weight_CW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return undefined raw keys `[Z + 1, R, C]`; the page behind the last takes what is not to be kept."""
    channels, width = weight_CW.shape
    return torch.empty(pages + 1, width - 1, channels, dtype=dtype, device=weight_CW.device)


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Where the new tokens of a batch lie.

    Attributes:
        block_table: int `[B, M]`, the pages of each sequence.
        lengths: int `[B]`, tokens of each sequence, the new ones included.
        starts: int `[B + 1]`, where each sequence's new tokens begin among all, and their number.
        slots: int64 `[N]`, page times P plus place within the page; negative where nothing is to be written.
        page_size: P.
        reach: R.
    """

    block_table: Tensor
    lengths: Tensor
    starts: Tensor
    slots: Tensor
    page_size: int
    reach: int

    @cached_property
    def places(self) -> Places:
        """Where their raw keys lie, the same for all layers; nothing waits for the device."""
        reach, page_size, device = self.reach, self.page_size, self.slots.device
        lengths, starts = self.lengths.long(), self.starts.long()
        first = lengths - starts.diff()
        back = torch.arange(reach, device=device)
        place = first[:, None] - reach + back
        exists = place >= 0
        page = self.block_table.gather(1, (place // page_size).clamp_min(0)).long()
        new = torch.arange(len(self.slots), device=device)
        sequence = torch.searchsorted(starts[1:], new, right=True)
        position = first[sequence] + new - starts[sequence]
        last = (self.slots % page_size >= page_size - reach) | (position >= lengths[sequence] - reach)
        kept = self.slots // page_size * reach + position % reach
        packed_before = starts[:-1, None] + reach * torch.arange(len(lengths), device=device)[:, None] + back
        return Places(
            before=torch.where(exists, page * reach + place % reach, 0),
            exists=exists[..., None],
            begins_page=(first % page_size == 0)[:, None, None],
            kept=torch.where(last & (self.slots >= 0), kept, -1),
            packed_before=packed_before,
            packed=new + reach * (sequence + 1),
        )


@dataclass(frozen=True)
class Places:
    """Where a batch's raw keys lie.

    Attributes:
        before: int64 `[B, R]`, the kept keys before the new tokens of each sequence, in pages side by side.
        exists: bool `[B, R, 1]`, whether the sequence has such a token.
        begins_page: bool `[B, 1, 1]`, whether the new tokens begin with a page.
        kept: int64 `[N]`, where each new token's key is to be kept, -1 being the page behind the last.
        packed_before, packed: int64 `[B, R]` and `[N]`, places in a sequence of all sequences, each its R keys before
            and then its new ones.
    """

    before: Tensor
    exists: Tensor
    begins_page: Tensor
    kept: Tensor
    packed_before: Tensor
    packed: Tensor


def convolve_paged(k_NC: Tensor, weight_CW: Tensor, raw_keys: Tensor, new: NewTokens) -> None:
    """Convolve the new tokens' keys in place, and keep those that later tokens need.

    Args:
        k_NC: raw keys, contiguous in their channels; `N` tokens as `new` has.
        weight_CW: as in `openmoba.ops.key_conv.key_convolution`.
        raw_keys: as `new_raw_keys` gave them; written to.
        new: this batch.
    """
    if k_NC.is_cuda:
        from openmoba.ops.triton import raw_keys as kernels

        batch = new.block_table, new.lengths, new.starts, new.slots
        kernels.convolve_paged(k_NC, weight_CW, raw_keys, *batch, new.page_size)
        return
    rows, places = raw_keys.flatten(0, 1), new.places
    earlier = rows[places.before]
    rows[places.kept] = k_NC
    before = torch.where(places.begins_page, rows[places.before], earlier)
    packed = k_NC.new_empty(len(k_NC) + places.packed_before.numel(), k_NC.shape[1])
    packed[places.packed_before] = torch.where(places.exists, before, 0)
    packed[places.packed] = k_NC
    k_NC.copy_(key_convolution(packed[None], weight_CW)[0, places.packed])
