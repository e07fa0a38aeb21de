"""The cache layer of fixed size, with a centroid per block and the last raw keys, as far as they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from openmoba.hf.layout import Layout
from openmoba.hf.pages import UNKNOWN, Pages, head_major
from openmoba.hf.values import refuse
from openmoba.ops.centroids import new_centroids
from openmoba.ops.pages import complete_pages

# B batch, H key/value heads, T new tokens, S cache slots, P pages, D head width, C channels of all key/value heads


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """A layer of fixed size, all tensors at fixed addresses.

    Attributes:
        block_size: tokens of a page; None for no pages.
        takes_left_padding_only: whether its mask has made sure of that.
    """

    takes_left_padding_only = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.block_size: int | None = None
        self._centroids: Tensor | None = None
        self._lengths: Tensor | None = None  # tokens of each row whose pages have their centroids, int32 [B]
        self._unpooled = 0  # at most so many tokens were written since
        self._raw_keys: Tensor | None = None  # as many as the convolution reaches back, [B, reach, C]
        self._convolved = 0  # new tokens whose raw keys are known, before their keys come

    @classmethod
    def of(cls, old: StaticLayer) -> FixedLayer:
        """Return a layer that holds what an ordinary one does."""
        new = cls(old.max_cache_len)
        new.__dict__.update(old.__dict__)
        return new

    def keep_pages(self, block_size: int) -> None:
        """Keep pages of so many tokens; those of another size are forgotten, and made when they are asked for."""
        if block_size != self.block_size:
            self.block_size, self._centroids = block_size, None
            if self.is_initialized:
                self._unpooled = self.max_cache_len
                self._allocate(self.keys, block_size)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, H, T, D]` keys and values into the next slots; return all slots."""
        if self._convolved != key_states.shape[2]:
            self._raw_keys = None  # not known of these tokens, nor of use without them
        self._convolved = 0
        if self.block_size is not None:
            if self._centroids is None:
                self._allocate(key_states, self.block_size)
            self._unpooled += key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def pages(self, keys_BSHD: Tensor, layout: Layout) -> Pages | None:
        """Bring the pages up to date and return them.

        None where rows are not single sequences behind padding, and where a model attends to other keys than those it
        caches, such as repeated ones, or ones that it makes of latents: pages are allocated before they are known.

        Args:
            keys_BSHD: of all slots.
            layout: where the rows lie; its mask has made sure that padding is on the left.
        """
        rows = layout.alignment(keys_BSHD, look=False)
        assert self._centroids is not None
        if rows is None or self._centroids.shape[2:] != keys_BSHD.shape[2:]:
            return None
        assert self._lengths is not None
        assert self.block_size is not None
        goes_on_B = (rows.lengths - self._unpooled).clamp_(min=0) == self._lengths
        torch._assert_async(goes_on_B.all(), "while a static cache is filled, the padding must stay as it is")
        self._lengths.copy_(rows.lengths)
        new, self._unpooled = self._unpooled, 0
        complete_pages(self._centroids, keys_BSHD, rows.lengths, rows.starts, new, self.block_size)
        return Pages(self._centroids, rows.lengths, rows.starts)

    def keys_before(self, reach: int) -> Tensor | None:
        """Return the last `reach` raw keys `[B, reach, C]`, zeros before the first token; None if there is no token.

        Raises:
            ValueError: there are tokens whose raw keys are not kept.
        """
        if self._raw_keys is None and self.is_initialized:
            refuse(self.get_seq_length() > 0, *UNKNOWN)
        return self._raw_keys

    def append_raw_keys(self, keys_BTC: Tensor, reach: int) -> None:
        """Remember the last `reach` raw keys, zeros for padding; their tensor keeps its address."""
        if self._raw_keys is None:
            self._raw_keys = keys_BTC.new_zeros(keys_BTC.shape[0], reach, keys_BTC.shape[2])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self._raw_keys)
        self._convolved = keys_BTC.shape[1]
        self._raw_keys.copy_(torch.cat([self._raw_keys, keys_BTC[:, -reach:]], 1)[:, -reach:])

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._unpooled = 0
        for tensor in (self._lengths, self._raw_keys):
            if tensor is not None:
                tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows by index, repeated or left out."""
        super().reorder_cache(beam_idx)
        rows = beam_idx.to(self.device)
        if self._centroids is not None and self._lengths is not None:
            self._centroids = head_major(lambda x: x.index_select(0, rows), self._centroids)
            self._lengths = self._lengths.index_select(0, rows)
        if self._raw_keys is not None:
            self._raw_keys = self._raw_keys.index_select(0, rows)

    def _allocate(self, key_states: Tensor, block_size: int) -> None:
        self._centroids = new_centroids(key_states.transpose(1, 2), self.max_cache_len, block_size)
        self._lengths = key_states.new_zeros(key_states.shape[0], dtype=torch.int32)
        if not torch.compiler.is_compiling():
            for tensor in (self._centroids, self._lengths):
                torch._dynamo.mark_static_address(tensor)
