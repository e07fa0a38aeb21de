"""Cache layers that keep one centroid per block beside the keys and values.

A transformers cache is a list of layers. `paged_layer` puts a paged layer in the place of the ordinary one for the
layers that run MoBA, dynamic or static, so that every cache that `generate` or a user makes works as it is; layers
with full attention keep the ordinary layer. Pages are brought up to date when the attention function asks for them,
since only then is it known where each row's first real token lies. A centroid is computed once, from the cached keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from openmoba.hf.layout import Layout
from openmoba.ops.pages import complete_pages, new_centroids

# B batch, H key/value heads, S cache slots, P pages, D head width


class PagedLayer(Protocol):
    """A cache layer with pages."""

    block_size: int

    def get_seq_length(self) -> int | Tensor:
        """Return the number of tokens in the cache."""
        ...

    def pages(self, keys_BSHD: Tensor, layout: Layout) -> Pages | None:
        """Bring the pages up to date and return them; None where rows are not single sequences behind padding.

        Args:
            keys_BSHD: what `update` returned, heads and slots exchanged.
            layout: where the rows lie.
        """
        ...


class Pages(NamedTuple):
    """What `openmoba.ops.decode.moba_decode` reads besides keys and values.

    Attributes:
        centroids: of the cached keys, `[B, P, H, D]`.
        lengths: tokens of each row, int32 `[B]`.
        starts: first slot of each row, int32 `[B]`; None for zeros.
    """

    centroids: Tensor
    lengths: Tensor
    starts: Tensor | None


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
        self._centroids: Tensor | None = None
        self._first: tuple[int, ...] | None = None  # where the rows' pages begin
        self._pooled = 0  # slots whose pages have their centroids
        self._offloaded: torch.cuda.Event | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H, T, D]` keys and values; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        new = (key_states, value_states)
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

    def take_over(self, old: DynamicLayer) -> None:
        """Start with what another layer holds."""
        if old.get_seq_length() > 0:
            self.update(old.keys, old.values)

    def pages(self, keys_BSHD: Tensor, layout: Layout) -> Pages | None:
        """See `PagedLayer`."""
        rows = layout.alignment(keys_BSHD, look=True)
        if rows is None:
            return None
        assert rows.first is not None
        if self._first != rows.first:
            self._first, self._pooled = rows.first, 0
        before, now, size = self._pooled, keys_BSHD.shape[1], self.block_size
        centroids = self._centroids = self._fitting_centroids(keys_BSHD)
        if any((now - first) // size > max(0, before - first) // size for first in set(self._first)):
            complete_pages(centroids, keys_BSHD.detach(), rows.lengths, rows.starts, now - before, size)
        self._pooled = now
        return Pages(centroids, rows.lengths, rows.starts)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; pages that held them are completed anew."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
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
        self._centroids, self._first = None, None
        self.is_initialized, self._stores, self._pooled = False, [], 0

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

    def _fitting_centroids(self, keys_BSHD: Tensor) -> Tensor:
        """Return centroids for all slots of the stores, with what is known of them."""
        slots, known = self._stores[0].shape[2], self._centroids
        if known is not None and known.shape[1] >= slots // self.block_size and _writable(known):
            return known
        centroids = new_centroids(keys_BSHD, slots, self.block_size)
        if known is not None:
            centroids[:, : known.shape[1]] = known
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
        if self._centroids is not None and self._first is not None:
            self._centroids = _head_major(pick, self._centroids)
            batch, same = self._centroids.shape[0], len(set(self._first)) == 1
            self._first = self._first[:1] * batch if same else tuple(pick(torch.tensor(self._first)).tolist())


class StaticPagedLayer(StaticLayer):  # type: ignore[misc]
    """A layer of fixed size with pages, all tensors at fixed addresses."""

    def __init__(self, max_cache_len: int, block_size: int) -> None:
        super().__init__(max_cache_len)
        self.block_size = block_size
        self._centroids: Tensor | None = None
        self._lengths: Tensor | None = None  # tokens of each row whose pages have their centroids, int32 [B]
        self._unpooled = 0  # at most so many tokens were written since

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, H, T, D]` keys and values into the next slots; return all slots."""
        if self._centroids is None:
            self._allocate(key_states)
        self._unpooled += key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def take_over(self, old: StaticLayer) -> None:
        """Start with what another layer holds; its pages are made when they are asked for."""
        size = self.block_size
        self.__dict__.update(old.__dict__ | {"block_size": size, "_unpooled": old.max_cache_len})
        self._allocate(old.keys)

    def pages(self, keys_BSHD: Tensor, layout: Layout) -> Pages | None:
        """See `PagedLayer`; the mask of a static cache makes sure that padding is on the left."""
        rows = layout.alignment(keys_BSHD, look=False)
        if rows is None:
            return None
        assert self._centroids is not None
        assert self._lengths is not None
        goes_on_B = (rows.lengths - self._unpooled).clamp_(min=0) == self._lengths
        torch._assert_async(goes_on_B.all(), "while a static cache is filled, the padding must stay as it is")
        self._lengths.copy_(rows.lengths)
        new, self._unpooled = self._unpooled, 0
        complete_pages(self._centroids, keys_BSHD, rows.lengths, rows.starts, new, self.block_size)
        return Pages(self._centroids, rows.lengths, rows.starts)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._unpooled = 0
        if self._lengths is not None:
            self._lengths.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows by index, repeated or left out."""
        super().reorder_cache(beam_idx)
        if self._centroids is not None and self._lengths is not None:
            rows = beam_idx.to(self.device)
            self._centroids = _head_major(lambda x: x.index_select(0, rows), self._centroids)
            self._lengths = self._lengths.index_select(0, rows)

    def _allocate(self, key_states: Tensor) -> None:
        self._centroids = new_centroids(key_states.transpose(1, 2), self.max_cache_len, self.block_size)
        self._lengths = key_states.new_zeros(key_states.shape[0], dtype=torch.int32)
        if not torch.compiler.is_compiling():
            for tensor in (self._centroids, self._lengths):
                torch._dynamo.mark_static_address(tensor)


def _writable(x: Tensor) -> bool:
    """Return False for a tensor of an inference mode that has ended."""
    return not x.is_inference() or torch.is_inference_mode_enabled()


def _head_major(pick: Callable[[Tensor], Tensor], x_BPHD: Tensor) -> Tensor:
    """Return `pick`'s rows, with a head's pages side by side in memory as they were."""
    return pick(x_BPHD.transpose(1, 2)).transpose(1, 2)


def paged_layer(cache: Cache, layer_idx: int, block_size: int) -> PagedLayer | None:
    """Return the paged layer at `layer_idx`, put there if an ordinary dynamic or static layer was.

    None for other kinds, such as quantized layers: their attention is computed from the keys alone.
    """
    if layer_idx < len(cache.layers):
        layer = cache.layers[layer_idx]
        if isinstance(layer, DynamicPagedLayer | StaticPagedLayer) and layer.block_size == block_size:
            return layer
    return _convert(cache, layer_idx, block_size)


def _convert(cache: Cache, layer_idx: int, block_size: int) -> PagedLayer | None:
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[layer_idx]
    kind = PAGED.get(type(old))
    if kind is None:
        return None
    new: Any = kind(block_size) if isinstance(old, DynamicLayer) else kind(old.max_cache_len, block_size)
    if old.is_initialized:
        new.take_over(old)
    cache.layers[layer_idx] = new
    return cast(PagedLayer, new)


PAGED: dict[type, Callable[..., Any]] = {
    DynamicLayer: DynamicPagedLayer,
    DynamicPagedLayer: DynamicPagedLayer,
    StaticLayer: StaticPagedLayer,
    StaticPagedLayer: StaticPagedLayer,
}
"""Kinds of cache layers, and those with pages that take their place."""
