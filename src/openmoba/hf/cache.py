"""Which cache layer keeps what MoBA and key convolution need beside keys and values.

A transformers cache is a list of layers. `kept_layer` puts one of ours in the place of an ordinary one, growing or of
fixed size, so that every cache that `generate` or a user makes works as it is. It keeps

    pages      one centroid per block, for layers that run MoBA. They are brought up to date when the attention asks for
               them, since only then is it known where each row's first real token lies. A centroid is computed once.
    raw keys   the last keys as projected, which key convolution needs for the next token. They are few, so they stay on
               their device when keys and values are offloaded.

Layers that need neither stay ordinary.
"""

from __future__ import annotations

from typing import Any, cast

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from openmoba.hf.fixed_layer import FixedLayer
from openmoba.hf.growing_layer import GrowingLayer

KeptLayer = GrowingLayer | FixedLayer


def kept_layer(cache: Cache, layer_idx: int, block_size: int | None = None) -> KeptLayer | None:
    """Return the layer at `layer_idx`, one of ours, put there if an ordinary one was.

    None for other kinds, such as quantized layers, and for layers that read another one's keys and have no part in the
    cache: MoBA computes their attention from the keys alone.

    Args:
        block_size: tokens of a page; None leaves pages, or that there are none, as it is.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers):
        return None
    layer: Any = cache.layers[layer_idx]
    if not isinstance(layer, KeptLayer):
        if type(layer) is DynamicLayer:
            layer = GrowingLayer.of(layer)
        elif type(layer) is StaticLayer:
            layer = FixedLayer.of(layer)
        else:
            return None
        cache.layers[layer_idx] = layer
    if block_size is not None:
        layer.keep_pages(block_size)
    return cast(KeptLayer, layer)
