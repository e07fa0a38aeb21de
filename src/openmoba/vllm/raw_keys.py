"""Key convolution over vLLM's kind of batch: the keys before a request's new tokens lie with the pages of its cache.

A convolution of width W needs the W - 1 raw keys before each new token. Those of a page's last tokens are kept in a
tensor of the same order as the pages, token t in slot t % (W - 1) of its page: the next tokens overwrite the oldest,
and a full page holds its own last ones. So they are shared, evicted and written anew with their page, as centroids
are, and vLLM need not know of them.

Requests that begin alike share full pages, maybe in the step that writes them: a request whose new tokens begin with a
page reads after the batch is written. One whose new tokens begin within a page, which is its own, reads before its
later tokens take the place of the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmoba.ops.key_conv import key_convolution

# Z pages of the cache, P tokens of a page, B requests, M pages of a request in the table, N new tokens of all requests,
# R = W - 1 keys before a token, C channels of all key heads


def new_raw_keys(pages: int, weight_CW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return undefined raw keys `[Z + 1, R, C]`; the page behind the last takes what is not to be kept."""
    channels, width = weight_CW.shape
    return torch.empty(pages + 1, width - 1, channels, dtype=dtype, device=weight_CW.device)


@dataclass(frozen=True)
class Places:
    """Where a batch's raw keys lie, the same for all layers.

    Attributes:
        before: int64 `[B, R]`, the kept keys before the new tokens of each request, in pages side by side.
        exists: bool `[B, R, 1]`, whether the request has such a token.
        begins_page: bool `[B, 1, 1]`, whether the new tokens begin with a page.
        kept: int64 `[N]`, where each new token's key is to be kept.
        packed_before, packed: int64 `[B, R]` and `[N]`, places in a sequence of all requests, each its R keys before
            and then its new ones.
    """

    before: Tensor
    exists: Tensor
    begins_page: Tensor
    kept: Tensor
    packed_before: Tensor
    packed: Tensor


def find_places(
    block_table: Tensor, lengths: Tensor, starts: Tensor, slots: Tensor, pages: int, page_size: int, reach: int
) -> Places:
    """Find them; nothing waits for the device.

    Args:
        block_table: int `[B, M]`, the pages of each request.
        lengths: int `[B]`, tokens of each request, the new ones included.
        starts: int `[B + 1]`, where each request's new tokens begin among all, and their number.
        slots: int64 `[N]`, page times P plus place within the page; negative where nothing is to be written.
        pages, page_size, reach: Z, P and R.
    """
    lengths, starts = lengths.long(), starts.long()
    first = lengths - starts.diff()
    back = torch.arange(reach, device=slots.device)
    place = first[:, None] - reach + back
    exists = place >= 0
    page = block_table.gather(1, (place // page_size).clamp_min(0)).long()
    new = torch.arange(len(slots), device=slots.device)
    request = torch.searchsorted(starts[1:], new, right=True)
    position = first[request] + new - starts[request]
    last = (slots % page_size >= page_size - reach) | (position >= lengths[request] - reach)
    packed_before = starts[:-1, None] + reach * torch.arange(len(lengths), device=slots.device)[:, None] + back
    return Places(
        before=torch.where(exists, page * reach + place % reach, 0),
        exists=exists[..., None],
        begins_page=(first % page_size == 0)[:, None, None],
        kept=torch.where(last & (slots >= 0), slots // page_size * reach + position % reach, pages * reach),
        packed_before=packed_before,
        packed=new + reach * (request + 1),
    )


def convolve_paged(k_NC: Tensor, weight_CW: Tensor, raw_keys: Tensor, places: Places) -> Tensor:
    """Return the new tokens' keys convolved, `[N, C]`, and keep those that later tokens need.

    Args:
        k_NC: raw keys.
        weight_CW: as in `openmoba.ops.key_conv.key_convolution`.
        raw_keys: as `new_raw_keys` gave them; written to.
        places: of this batch.
    """
    rows = raw_keys.flatten(0, 1)
    earlier = rows[places.before]
    rows[places.kept] = k_NC
    before = torch.where(places.begins_page, rows[places.before], earlier)
    packed = k_NC.new_empty(len(k_NC) + places.packed_before.numel(), k_NC.shape[1])
    packed[places.packed_before] = torch.where(places.exists, before, 0)
    packed[places.packed] = k_NC
    return key_convolution(packed[None], weight_CW)[0, places.packed]
