"""The cache layer that grows, with a centroid per block and the last raw keys, as far as they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from openmoba.hf.layout import Layout
from openmoba.hf.pages import UNKNOWN, Pages, head_major
from openmoba.ops.centroids import new_centroids
from openmoba.ops.pages import complete_pages

KEPT = 256
"""Raw keys that are kept, so that `crop` can take back as many tokens, less the key convolution's reach."""

# B batch, H key/value heads, T new tokens, S cache slots, P pages, D head width, C channels of all key/value heads


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A growing layer.

    Unlike its base class it grows by a small reserve, so that appending a token does not copy the whole cache.

    Attributes:
        keys, values: `[B, H, tokens, D]`, views of the first slots of the stores.
        block_size: tokens of a page; None for no pages.
        takes_left_padding_only: whether its mask has made sure of that.
    """

    takes_left_padding_only = False

    _stores: list[Tensor]
    _centroids: Tensor | None
    _first: tuple[int, ...] | None  # where the rows' pages begin
    _pooled: int  # slots whose pages have their centroids
    _raw_keys: Tensor | None  # the last ones, [B, at most KEPT, C]
    _reach: int  # how many of them the next token needs
    _convolved: int  # new tokens whose raw keys are known, before their keys come
    _offloaded: torch.cuda.Event | None

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.block_size: int | None = None
        self._forget()

    @classmethod
    def of(cls, old: DynamicLayer) -> GrowingLayer:
        """Return a layer that holds what an ordinary one does."""
        new = cls()
        if old.get_seq_length() > 0:
            new.update(old.keys, old.values)
        return new

    def keep_pages(self, block_size: int) -> None:
        """Keep pages of so many tokens; those of another size are forgotten."""
        if block_size != self.block_size:
            self.block_size, self._centroids, self._pooled = block_size, None, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H, T, D]` keys and values; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        new = (key_states, value_states)
        if self._convolved != key_states.shape[2]:
            self._raw_keys = None  # not known of these tokens, nor of use without them
        self._convolved = 0
        if torch.is_grad_enabled():
            # Attention may have saved the stores for backward: they must not be written to.
            old = (self.keys, self.values)
            self._stores = [torch.cat(pair, 2) if before else pair[1] for pair in zip(old, new, strict=True)]
        else:
            self._reserve(after, new)
            for store, states in zip(self._stores, new, strict=True):
                store[:, :, before:after] = states
        self._show(after)
        return self.keys, self.values

    def pages(self, keys_BSHD: Tensor, layout: Layout) -> Pages | None:
        """Bring the pages up to date and return them; None where rows are not single sequences behind padding.

        Args:
            keys_BSHD: what `update` returned, heads and slots exchanged.
            layout: where the rows lie.
        """
        rows = layout.alignment(keys_BSHD, look=True)
        if rows is None:
            return None
        assert rows.first is not None
        assert self.block_size is not None
        if self._first != rows.first:
            self._first, self._pooled = rows.first, 0
        before, now, size = self._pooled, keys_BSHD.shape[1], self.block_size
        centroids = self._centroids = self._fitting_centroids(keys_BSHD, self.block_size)
        if any((now - first) // size > max(0, before - first) // size for first in set(self._first)):
            complete_pages(centroids, keys_BSHD.detach(), rows.lengths, rows.starts, now - before, size)
        self._pooled = now
        return Pages(centroids, rows.lengths, rows.starts)

    def keys_before(self, reach: int) -> Tensor | None:
        """Return the last `reach` raw keys `[B, reach, C]`, zeros before the first token; None if there is no token.

        Raises:
            ValueError: there are tokens whose raw keys are not kept.
        """
        if self._raw_keys is None:
            if self.get_seq_length() > 0:
                raise ValueError("; ".join(UNKNOWN))
            return None
        known = min(reach, self._raw_keys.shape[1])
        return pad(self._raw_keys[:, self._raw_keys.shape[1] - known :], (0, 0, reach - known, 0))

    def append_raw_keys(self, keys_BTC: Tensor, reach: int) -> None:
        """Remember the raw keys of new tokens, zeros for padding, of which the next tokens need `reach`."""
        last, old = keys_BTC[:, -KEPT:], self._raw_keys
        # A copy, since a slice would keep the keys of a whole prompt alive.
        self._raw_keys = last.clone() if old is None else torch.cat([old, last], 1)[:, -KEPT:]
        self._reach, self._convolved = reach, keys_BTC.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; pages that held them are completed anew.

        Raises:
            ValueError: the raw keys before them are not kept any more.
        """
        before, raw = self.get_seq_length(), self._raw_keys
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, before - tokens_to_remove)
        if raw is not None and removed:
            left = raw.shape[1] - removed
            if left < min(self._reach, before - removed):
                raise ValueError(
                    f"cannot drop the last {removed} of {before} cached tokens: key convolution keeps what it needs "
                    f"for {raw.shape[1] - self._reach}; crop in time, or copy the cache before it grows"
                )
            self._raw_keys = raw[:, :left] if left > 0 else None
        super().crop(tokens_to_remove)
        self._pooled = min(self._pooled, self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows by index, repeated or left out."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row so many times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move keys and values to the CPU; the pages, a hundredth of their size, stay."""
        self._move("cpu")
        if self.is_initialized and self.device.type == "cuda":
            self._offloaded = torch.cuda.current_stream(self.device).record_event()

    def prefetch(self) -> None:
        """Move keys and values back, on the stream of the caller, for use on the default stream."""
        if not self.is_initialized:
            return
        if self._offloaded is not None:
            torch.cuda.current_stream(self.device).wait_event(self._offloaded)
        self._move(self.device)
        for store in self._stores:
            if store.is_cuda:
                # Attention reads the stores themselves: they must outlive it before their memory serves a prefetch.
                store.record_stream(torch.cuda.default_stream(self.device))

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def _forget(self) -> None:
        self._stores = []
        self._centroids = self._first = self._raw_keys = self._offloaded = None
        self._pooled = self._reach = self._convolved = 0

    def _reserve(self, tokens: int, like: tuple[Tensor, Tensor]) -> None:
        """Make the stores hold `tokens`; the reserve keeps both their size and the copying down."""
        if self._stores and self._stores[0].shape[2] >= tokens and _writable(self._stores[0]):
            return
        slots = tokens + max(64, tokens // 1024)
        used = self.get_seq_length()
        stores = [x.new_empty(*x.shape[:2], slots, x.shape[3]) for x in like]
        for store, old in zip(stores, (self.keys, self.values), strict=True):
            if used:
                store[:, :, :used] = old
        self._stores = stores

    def _fitting_centroids(self, keys_BSHD: Tensor, block_size: int) -> Tensor:
        """Return centroids for all slots of the stores, with what is known of them."""
        slots, known = self._stores[0].shape[2], self._centroids
        if known is not None and known.shape[1] >= slots // block_size and _writable(known):
            return known
        centroids = new_centroids(keys_BSHD, slots, block_size)
        if known is not None:
            pages = min(known.shape[1], centroids.shape[1])  # without a reserve fewer than there were with one
            centroids[:, :pages] = known[:, :pages]
        return centroids

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (store[:, :, :tokens] for store in self._stores)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            tokens = self.get_seq_length()
            self._stores = [store.to(device, non_blocking=True) for store in self._stores]
            self._show(tokens)

    def _map_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        tokens = self.get_seq_length()
        if tokens == 0:
            return
        self._stores = [pick(store) for store in self._stores]
        self._show(tokens)
        if self._raw_keys is not None:
            self._raw_keys = pick(self._raw_keys)
        if self._centroids is not None and self._first is not None:
            self._centroids = head_major(pick, self._centroids)
            batch, same = self._centroids.shape[0], len(set(self._first)) == 1
            self._first = self._first[:1] * batch if same else tuple(pick(torch.tensor(self._first)).tolist())


def _writable(x: Tensor) -> bool:
    """Return False for a tensor of an inference mode that has ended, or that a backward pass may need."""
    return not x.requires_grad and (not x.is_inference() or torch.is_inference_mode_enabled())
