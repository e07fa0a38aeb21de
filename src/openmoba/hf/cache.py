"""Cache layers that keep one centroid per block beside the keys and values.

A transformers cache is a list of layers. `paged_layer` puts a paged layer in the place of the ordinary one for the
layers that run MoBA, dynamic or static, so that every cache that `generate` or a user makes works as it is; layers
with full attention keep the ordinary layer. Pages are brought up to date when the attention function asks for them,
since only then is it known where each row's first real token lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from openmoba.hf.alignment import Alignment, aligned, alignment_of, static_alignment
from openmoba.hf.eager import eager
from openmoba.ops.decode import MAX_QUERIES
from openmoba.ops.pages import extend_pages, new_pages, refresh_pages

# B batch, H key/value heads, S cache slots, P pages, D head width


class PagedLayer(Protocol):
    """A cache layer with pages."""

    block_size: int

    def get_seq_length(self) -> int | Tensor:
        """Tokens in the cache."""
        ...

    def align(self, segment_map: Tensor | None, keys_BSHD: Tensor) -> Alignment | None:
        """Where the rows begin under this mask; None if padding lies elsewhere than before them."""
        ...

    def pages(self, keys_BSHD: Tensor, alignment: Alignment, new: int) -> Tensor:
        """Centroids `[B, P, H, D]` of the cached keys, for `openmoba.ops.decode.moba_decode`.

        Args:
            keys_BSHD: what `update` returned, heads and slots exchanged.
            alignment: where the rows begin.
            new: tokens written by the last `update`.
        """
        ...


class DynamicPagedLayer(DynamicLayer):  # type: ignore[misc]
    """A growing layer with pages.

    Unlike its base class it grows by a small reserve, so that appending a token does not copy the whole cache.

    Attributes:
        keys, values: `[B, H, tokens, D]`, views of the first slots of the stores.
    """

    keys: Any
    values: Any

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self._stores: list[Tensor] = []
        self._sums: Tensor | None = None
        self._alignment: Alignment | None = None
        self._pooled = 0  # tokens that the pages hold
        self._continues = False  # whether the open page's sum can be added to
        self._offloaded: torch.cuda.Event | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H, T, D]` keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        new = (key_states, value_states)
        if any(x.requires_grad for x in (self.keys, self.values, *new)) and torch.is_grad_enabled():
            # Attention has saved the stores for backward: they must not be written to.
            old = (self.keys, self.values)
            self._stores = [torch.cat(pair, 2) if before else pair[1] for pair in zip(old, new, strict=True)]
        else:
            self._reserve(after, new)
            for store, states in zip(self._stores, new, strict=True):
                store[:, :, before:after] = states
        self._show(after)
        return self.keys, self.values

    def align(self, segment_map: Tensor | None, keys_BSHD: Tensor) -> Alignment | None:
        """See `PagedLayer.align`."""
        if segment_map is None:
            return aligned(keys_BSHD.shape[0], keys_BSHD.device)
        return alignment_of(segment_map)

    def pages(self, keys_BSHD: Tensor, alignment: Alignment, new: int) -> Tensor:
        """See `PagedLayer.pages`."""
        tokens = keys_BSHD.shape[1]
        if self._alignment is None or self._alignment.first != alignment.first:
            self._pooled, self._continues = 0, False
        self._alignment = alignment
        keys_BSHD, size = keys_BSHD.detach(), self.block_size
        sums = self._sums = self._fitting_sums(keys_BSHD)
        lag = tokens - self._pooled
        if self._continues and lag <= MAX_QUERIES:
            extend_pages(sums, keys_BSHD[:, self._pooled :], alignment.starts, self._pooled, size)
        else:
            refresh_pages(sums, keys_BSHD, alignment.starts, self._pooled, tokens, lag, size)
        self._pooled, self._continues = tokens, True
        return sums[:, :-1]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; pages that held them are recomputed when they are next needed."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._pooled, self._continues = min(self._pooled, self.get_seq_length()), False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, repeated or left out."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows at `indices`."""
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
        self._sums, self._alignment = None, None
        self.is_initialized, self._stores, self._pooled, self._continues = False, [], 0, False

    def _reserve(self, tokens: int, like: tuple[Tensor, Tensor]) -> None:
        """Make the stores hold `tokens`; the reserve keeps both their size and the copying down."""
        if self._stores and self._stores[0].shape[2] >= tokens:
            return
        slots = tokens + max(64, tokens // 1024)
        used = self.get_seq_length()
        stores = [x.new_empty(*x.shape[:2], slots, x.shape[3]) for x in like]
        for store, old in zip(stores, (self.keys, self.values), strict=True):
            if used:
                store[:, :, :used] = old
        self._stores = stores

    def _fitting_sums(self, keys_BSHD: Tensor) -> Tensor:
        slots = self._stores[0].shape[2]
        if self._sums is not None and (self._sums.shape[1] - 1) * self.block_size >= slots:
            return self._sums
        sums = new_pages(keys_BSHD, slots, self.block_size)
        if self._sums is not None:
            sums[:, : self._sums.shape[1] - 1] = self._sums[:, :-1]
        return sums

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
        if self._sums is not None and self._alignment is not None:
            self._sums = pick(self._sums)
            self._alignment = self._alignment.pick(pick)


class StaticPagedLayer(StaticLayer):  # type: ignore[misc]
    """A layer of fixed size with pages, all tensors at fixed addresses."""

    def __init__(self, max_cache_len: int, block_size: int) -> None:
        super().__init__(max_cache_len)
        self.block_size = block_size
        self._sums: Tensor | None = None
        self._starts: Tensor | None = None
        self._held: Tensor | None = None  # tokens that the pages hold
        self._pooled = False  # whether they hold any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, H, T, D]` keys and values into the next slots; returns all slots."""
        if self._sums is None:
            self._allocate(key_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def align(self, segment_map: Tensor | None, keys_BSHD: Tensor) -> Alignment | None:
        """See `PagedLayer.align`; the mask of a static cache makes sure that padding is on the left."""
        assert segment_map is not None
        return static_alignment(segment_map)

    def pages(self, keys_BSHD: Tensor, alignment: Alignment, new: int) -> Tensor:
        """See `PagedLayer.pages`."""
        assert self._sums is not None
        assert self._starts is not None
        assert self._held is not None
        end, size = self.cumulative_length, self.block_size
        if not self._pooled:
            self._starts.copy_(alignment.starts)
            refresh_pages(self._sums, keys_BSHD, alignment.starts, 0, end, self.max_cache_len, size)
            self._held.copy_(end)
            self._pooled = True
            return self._sums[:, :-1]
        empty_B = self._starts == self._held  # a row of padding so far begins later
        goes_on = ((self._starts == alignment.starts) | empty_B).all() & (self._held == end - new)
        torch._assert_async(goes_on, "while a static cache is filled, padding and attention must stay as they are")
        self._starts.copy_(alignment.starts)
        self._held.copy_(end)
        if new <= MAX_QUERIES:
            slot_T = end - new + torch.arange(new, device=keys_BSHD.device)
            new_BTHD = keys_BSHD.index_select(1, slot_T)
            extend_pages(self._sums, new_BTHD, alignment.starts, end - new, size)
        else:
            refresh_pages(self._sums, keys_BSHD, alignment.starts, end - new, end, new, size)
        return self._sums[:, :-1]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._pooled = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, repeated or left out."""
        super().reorder_cache(beam_idx)
        if self._sums is not None and self._starts is not None:
            self._sums, self._starts = (x.index_select(0, beam_idx.to(x.device)) for x in (self._sums, self._starts))

    def _allocate(self, key_states: Tensor) -> None:
        self._sums = new_pages(key_states.transpose(1, 2), self.max_cache_len, self.block_size)
        self._starts = key_states.new_zeros(key_states.shape[0], dtype=torch.int32)
        self._held = key_states.new_zeros((), dtype=torch.long)
        if not torch.compiler.is_compiling():
            for tensor in (self._sums, self._starts, self._held):
                torch._dynamo.mark_static_address(tensor)


def paged_layer(cache: Cache, layer_idx: int, block_size: int) -> PagedLayer | None:
    """The paged layer at `layer_idx`, put there if an ordinary dynamic or static layer was.

    None for other kinds, such as quantized layers: their attention is computed from the keys alone.
    """
    if layer_idx < len(cache.layers):
        layer = cache.layers[layer_idx]
        if isinstance(layer, DynamicPagedLayer | StaticPagedLayer) and layer.block_size == block_size:
            return layer
    return _convert(cache, layer_idx, block_size)


@eager("the layers of a cache are replaced once")
def _convert(cache: Cache, layer_idx: int, block_size: int) -> PagedLayer | None:
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[layer_idx]
    if type(old) in (DynamicLayer, DynamicPagedLayer):
        dynamic = DynamicPagedLayer(block_size)
        if old.is_initialized and old.get_seq_length() > 0:
            dynamic.update(old.keys, old.values)
        cache.layers[layer_idx] = dynamic
        return dynamic
    if type(old) in (StaticLayer, StaticPagedLayer):
        static = StaticPagedLayer(old.max_cache_len, block_size)
        if old.is_initialized:
            paged = {"block_size": block_size, "_sums": None, "_starts": None, "_held": None, "_pooled": False}
            static.__dict__.update(old.__dict__ | paged)
            static._allocate(old.keys)
        cache.layers[layer_idx] = static
        return static
    return None
