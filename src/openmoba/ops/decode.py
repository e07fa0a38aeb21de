"""MoBA for a few new tokens over a paged key/value cache: `moba_decode`.

    s_p = <q, c_p>   for the pages before the query's own; the top_k - 1 best are read, ties to the later page
    o   = softmax(scale * q K[I]^T) V[I]   over these pages and the query's own, causally

Source: MoBA technical report, arXiv 2502.13189, equations 2 to 6, with the block centroids kept in the
cache (`openmoba.ops.pages`) instead of computed anew. The cost is `top_k * block_size` keys and one centroid per page.

`impl` picks speed, never meaning: "reference" (`openmoba.ops.reference`), "triton", or "auto", which is "triton" for
CUDA tensors and "reference" for fp64 and for other devices.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from openmoba.config import check_blocks
from openmoba.ops.arguments import KeyCache
from openmoba.ops.backends import DECODERS, Decoder, decoder, implementation
from openmoba.ops.centroids import centroid_dtype
from openmoba.ops.checks import DTYPES, check_rows, check_scale, check_tensors, needs_gradient
from openmoba.ops.operation import operation
from openmoba.ops.pages import check_row_values
from openmoba.ops.reference import reference_decode

MAX_QUERIES = 16


@operation(Decoder.decode, fake=lambda _, q, *__: q.new_empty(q.shape))
def decode(name: str, *arguments: Any) -> Tensor:
    """Attend to the chosen pages, not differentiable."""
    return decoder(name).decode(*arguments)


def moba_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend from each row's last T tokens to its own cached tokens, reading `top_k` blocks per query and head.

    Row b's tokens lie in the cache slots `starts[b] : starts[b] + lengths[b]`, the T query tokens last:

        left padding    . . k k k q      starts 2, lengths 4
        ragged lengths  k k q . . .      starts 0, lengths 3

    Args:
        q: `[B, T, H, D]` with 1 <= T <= 16.
        k_cache: `[B, S, Hkv, D]`, any strides; the new tokens' keys already written.
        v_cache: the values, like k_cache.
        centroids: `[B, P, Hkv, D]`, any strides, kept by `openmoba.complete_pages`: fp16 for 16-bit caches,
            else in their dtype. Page p of row b begins at slot `starts[b] + p * block_size`. No row may have more
            past pages than P, `(lengths[b] - 1) // block_size`: on CUDA the others are not seen, and nobody looks.
        lengths: int32 `[B]`, tokens in the cache, the new ones included.
        starts: int32 `[B]`, first slot of each row; zeros by default.
        block_size, top_k, scale: as in `openmoba.moba_attention`.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back. Triton's caches and centroids
            have a contiguous last dimension.

    Returns:
        `[B, T, H, D]` in q's dtype, also under autocast, which would copy the caches; zero for queries before a
        row's first token. Not differentiable.

    Raises:
        ValueError: naming the argument and its value, or that an input requires a gradient while gradients are
            recorded. On CUDA the values inside `lengths` and `starts` are not read by the host, and the call waits for
            no device and fits a CUDA graph.
    """
    cache = KeyCache(centroids, k_cache, lengths, starts, block_size)
    _check(q, cache, v_cache, top_k)
    if needs_gradient(q, k_cache, v_cache):
        raise ValueError(
            "moba_decode has no gradient, and an input requires one; use moba_attention, with impl='reference' for "
            "forward mode (jvp), or torch.no_grad()"
        )
    scale = check_scale(q, scale)
    name, _ = implementation(q, impl, DECODERS)
    if name == "reference":
        return reference_decode(q, cache, v_cache, top_k, scale)
    for name_of, x in (("k_cache", k_cache), ("v_cache", v_cache), ("centroids", centroids)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name_of}'s last dimension must be contiguous, got strides {x.stride()}")
    q = q if q.stride(-1) == 1 else q.contiguous()
    return decode(name, q, cache, v_cache, top_k, scale)


def _check(q: Tensor, cache: KeyCache, v_cache: Tensor, top_k: int) -> None:
    centroids, k_cache, lengths, starts, block_size = cache
    check_blocks(block_size, top_k)
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, centroids=centroids)
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; use float64, float32, float16 or bfloat16")
    if q.dim() != 4 or not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(
            f"q must be [batch, 1..{MAX_QUERIES} tokens, heads, dim], got {tuple(q.shape)}; "
            "use moba_attention for more tokens"
        )
    batch, _, heads, width = q.shape
    if k_cache.dim() != 4 or k_cache.shape[0] != batch or k_cache.shape[1] == 0 or k_cache.shape[3] != width:
        raise ValueError(f"k_cache must be [{batch}, slots >= 1, heads, {width}], got {tuple(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache must have k_cache's shape {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}")
    kv_heads = k_cache.shape[2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of the cache's {kv_heads} heads")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache must share a dtype, got {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    shape = (*centroids.shape[:1], *centroids.shape[2:])
    if centroids.dtype != centroid_dtype(q.dtype) or shape != (batch, kv_heads, width):
        raise ValueError(
            f"centroids must be {centroid_dtype(q.dtype)} [{batch}, pages, {kv_heads}, {width}], "
            f"got {centroids.dtype} {tuple(centroids.shape)}; openmoba.new_centroids makes them"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("centroids", centroids)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    check_rows(lengths, starts, q)
    past = (check_row_values(lengths, starts, k_cache.shape[1]) - 1) // block_size
    if past > centroids.shape[1]:
        raise ValueError(
            f"a row has {past} blocks before its last one, but centroids have {centroids.shape[1]} pages; "
            "openmoba.new_centroids makes enough for a cache"
        )
