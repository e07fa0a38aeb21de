"""Cache layers that also keep the last keys as projected, which key convolution needs for the next token.

`raw_keys_layer` puts one in the place of an ordinary or paged layer. Raw keys are few, so they stay on their device
when keys and values are offloaded.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from openmoba.hf.cache import PAGED, DynamicPagedLayer, StaticPagedLayer

KEPT = 256
"""Raw keys that a dynamic layer keeps, so that `crop` can take back as many tokens, less the convolution's reach."""

# B batch, T tokens, P tokens that the convolution reaches back, C channels of all key/value heads


class RawKeysLayer(Protocol):
    """A cache layer with raw keys."""

    takes_left_padding_only: bool

    def keys_before(self, reach: int) -> Tensor | None:
        """Return the last `reach` raw keys `[B, P, C]`, zeros before the first token; None if there is no token yet."""
        ...

    def append_raw_keys(self, keys_BTC: Tensor, reach: int) -> None:
        """Remember the raw keys of new tokens, zeros for padding."""
        ...


class _DynamicRawKeys(DynamicLayer):  # type: ignore[misc]
    takes_left_padding_only = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.raw_keys: Tensor | None = None

    def keys_before(self, reach: int) -> Tensor | None:
        """See `RawKeysLayer`."""
        if self.raw_keys is None:
            return None
        known = min(reach, self.raw_keys.shape[1])
        return pad(self.raw_keys[:, self.raw_keys.shape[1] - known :], (0, 0, reach - known, 0))

    def append_raw_keys(self, keys_BTC: Tensor, reach: int) -> None:
        """See `RawKeysLayer`."""
        last = keys_BTC[:, -KEPT:]
        # A copy, since a slice would keep the keys of a whole prompt alive.
        self.raw_keys = last.clone() if self.raw_keys is None else torch.cat([self.raw_keys, last], 1)[:, -KEPT:]
        self._reach = reach

    def take_over(self, old: Any) -> None:
        """Start with what another layer holds."""
        super().take_over(old)
        self.raw_keys, self._reach = old.raw_keys, old._reach

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; ValueError if the raw keys before them are not kept any more."""
        before = self.get_seq_length()
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, before - tokens_to_remove)
        if self.raw_keys is not None and removed:
            left = self.raw_keys.shape[1] - removed
            if left < min(self._reach, before - removed):
                raise ValueError(
                    f"cannot drop the last {removed} of {before} cached tokens: key convolution keeps what it needs "
                    f"for {self.raw_keys.shape[1] - self._reach}; crop in time, or copy the cache before it grows"
                )
            self.raw_keys = self.raw_keys[:, :left] if left > 0 else None
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows by index, repeated or left out."""
        super().reorder_cache(beam_idx)
        if self.raw_keys is not None:
            self.raw_keys = self.raw_keys.index_select(0, beam_idx.to(self.raw_keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row so many times."""
        super().batch_repeat_interleave(repeats)
        if self.raw_keys is not None:
            self.raw_keys = self.raw_keys.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        super().batch_select_indices(indices)
        if self.raw_keys is not None:
            self.raw_keys = self.raw_keys[indices.to(self.raw_keys.device)]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.keys = self.values = self.raw_keys = None
        self.is_initialized = False


class _StaticRawKeys(StaticLayer):  # type: ignore[misc]
    takes_left_padding_only = True  # as its mask has made sure

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.raw_keys: Tensor | None = None

    def keys_before(self, reach: int) -> Tensor | None:
        """See `RawKeysLayer`."""
        return self.raw_keys

    def append_raw_keys(self, keys_BTC: Tensor, reach: int) -> None:
        """See `RawKeysLayer`; the tensor keeps its address."""
        if self.raw_keys is None:
            self.raw_keys = keys_BTC.new_zeros(keys_BTC.shape[0], reach, keys_BTC.shape[2])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.raw_keys)
        self.raw_keys.copy_(torch.cat([self.raw_keys, keys_BTC[:, -reach:]], 1)[:, -reach:])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows by index, repeated or left out."""
        super().reorder_cache(beam_idx)
        if self.raw_keys is not None:
            self.raw_keys = self.raw_keys.index_select(0, beam_idx.to(self.raw_keys.device))

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        if self.raw_keys is not None:
            self.raw_keys.zero_()


class DynamicRawLayer(_DynamicRawKeys):
    """A growing layer for full attention, with raw keys."""


class DynamicPagedRawLayer(_DynamicRawKeys, DynamicPagedLayer):
    """A growing layer for MoBA, with raw keys."""


class StaticRawLayer(_StaticRawKeys):
    """A layer of fixed size for full attention, with raw keys."""


class StaticPagedRawLayer(_StaticRawKeys, StaticPagedLayer):
    """A layer of fixed size for MoBA, with raw keys."""


PAGED |= {
    DynamicRawLayer: DynamicPagedRawLayer,
    DynamicPagedRawLayer: DynamicPagedRawLayer,
    StaticRawLayer: StaticPagedRawLayer,
    StaticPagedRawLayer: StaticPagedRawLayer,
}


def raw_keys_layer(cache: Cache, layer_idx: int) -> RawKeysLayer:
    """Return the layer at `layer_idx` of a cache, one with raw keys put there if it has none.

    Raises:
        ValueError: a layer of this kind cannot keep them, or it holds tokens already.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    old: Any = cache.layers[layer_idx]
    if isinstance(old, _DynamicRawKeys | _StaticRawKeys):
        return cast(RawKeysLayer, old)
    new: Any
    if type(old) is DynamicLayer:
        new = DynamicRawLayer()
    elif type(old) is DynamicPagedLayer:
        new = DynamicPagedRawLayer(old.block_size)
    elif type(old) is StaticLayer:
        new = StaticRawLayer(old.max_cache_len)
    elif type(old) is StaticPagedLayer:
        new = StaticPagedRawLayer(old.max_cache_len, old.block_size)
    else:
        raise ValueError(
            f"key convolution needs a dynamic or static cache, got a {type(old).__name__}; "
            "leave cache_implementation out, or set it to 'static'"
        )
    if old.is_initialized:
        _refuse_tokens(old.get_seq_length())
        new.__dict__.update(old.__dict__)
    cache.layers[layer_idx] = new
    return cast(RawKeysLayer, new)


def _refuse_tokens(cached: int | Tensor) -> None:
    message = "this cache was filled without key convolution, whose first keys it lacks; start with an empty one"
    if isinstance(cached, Tensor) and torch.compiler.is_compiling():
        torch._assert_async(cached == 0, message)
    elif cached > 0:
        raise ValueError(message)
