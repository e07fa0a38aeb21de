"""MoBA for a few new tokens over a paged key/value cache: `moba_decode`.

    s_p = <q, c_p>   for the pages before the query's own; the top_k - 1 best are read, ties to the later page
    o   = softmax(scale * q K[I]^T) V[I]   over these pages and the query's own, causally

Source: MoBA technical report, arXiv 2502.13189, equations 2 to 6, with the block centroids kept in the
cache (`openmoba.ops.pages`) instead of computed anew. The cost is `top_k * block_size` keys and one centroid per page.

`impl` picks speed, never meaning:

    "reference"  torch operations, any device, one query token after the other
    "triton"     CUDA kernels; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)
    "auto"       "triton" for CUDA tensors, "reference" for fp64 and for other devices
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmoba.config import check_blocks
from openmoba.ops.checks import check_scale, check_triton, needs_gradient
from openmoba.ops.library import device_of, is_plain, one_by_one
from openmoba.ops.pages import accumulation_dtype, centroid_dtype

IMPLEMENTATIONS = ("auto", "reference", "triton")
MAX_QUERIES = 16

# B batch rows, T query tokens, S cache slots, P pages, H query heads, Hkv key/value heads, G = H / Hkv,
# D head width, K blocks read, N = K * block_size key slots gathered per query and head


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
    """Attention of each row's last T tokens over its own cached tokens, reading `top_k` blocks per query and head.

    Row b's tokens lie in the cache slots `starts[b] : starts[b] + lengths[b]`, the T query tokens last:

        left padding    . . k k k q      starts 2, lengths 4
        ragged lengths  k k q . . .      starts 0, lengths 3

    Args:
        q: `[B, T, H, D]` with 1 <= T <= 16.
        k_cache: `[B, S, Hkv, D]`, any strides; the new tokens' keys already written.
        v_cache: the values, like k_cache.
        centroids: `[B, P, Hkv, D]`, any strides, kept by `openmoba.ops.pages.complete_pages`: fp16 for 16-bit caches,
            else in their dtype. Page p of row b begins at slot `starts[b] + p * block_size`.
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
            recorded. The values inside `lengths` and `starts` are not read by the host, and the call waits for no
            device and fits a CUDA graph.
    """
    _check(q, k_cache, v_cache, centroids, lengths, starts, block_size, top_k)
    if needs_gradient(q, k_cache, v_cache):
        raise ValueError(
            "moba_decode has no gradient, and an input requires one; use moba_attention, with impl='reference' for "
            "forward mode (jvp), or torch.no_grad()"
        )
    scale = check_scale(q, scale)
    if _implementation(q, impl) == "triton":
        return _decode_triton(q, k_cache, v_cache, centroids, lengths, starts, block_size, top_k, scale)
    starts = torch.zeros_like(lengths) if starts is None else starts
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        rows = [
            _decode_one(q[:, t], k_cache, v_cache, centroids, position_B, starts, block_size, top_k, scale)
            for t, position_B in enumerate((lengths[:, None] - q.shape[1] + _range(q, q.shape[1])).unbind(1))
        ]
    return torch.stack(rows, 1)


def _implementation(q: Tensor, impl: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        impl = "triton" if q.device.type == "cuda" and q.dtype != torch.float64 else "reference"
    elif impl == "triton" and q.dtype == torch.float64:
        raise ValueError("impl='triton' does not compute in float64; use impl='reference'")
    if impl == "triton":
        check_triton(q)
    return impl


def _decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("centroids", centroids)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {x.stride()}")
    q = q if q.stride(-1) == 1 else q.contiguous()
    arguments = (q, k_cache, v_cache, centroids, lengths, starts, block_size, top_k, scale)
    if is_plain(q, k_cache, v_cache, centroids, lengths):  # dispatch would take as long as the kernels
        return _triton_decode(*arguments)
    with torch.no_grad():
        out: Tensor = torch.ops.openmoba.triton_decode(*arguments)
    return out


def _triton_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    from openmoba.ops.triton.decode import decode  # importing openmoba needs torch alone

    with device_of(q):
        return decode(q, k_cache, v_cache, centroids, lengths, starts, block_size, top_k, scale)


_decode_op = torch.library.custom_op("openmoba::triton_decode", _triton_decode, mutates_args=())


@_decode_op.register_fake
def _fake_triton_decode(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


_decode_op.register_vmap(lambda info, dims, *arguments: one_by_one(_decode_op, info, dims, arguments))


def _decode_one(
    q_BHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    centroid_BPHD: Tensor,
    position_B: Tensor,
    starts_B: Tensor,
    block_size: int,
    top_k: int,
    scale: float,
) -> Tensor:
    """One query per row, at `position_B` within the row: `[B, H, D]`."""
    own_B = position_B // block_size
    page_BHK = _choose_pages(q_BHD, centroid_BPHD, own_B, top_k)
    position_BHN = (page_BHK[..., None] * block_size + _range(q_BHD, block_size)).flatten(2)
    read_BHN = (position_BHN >= 0) & (position_BHN <= position_B[:, None, None])
    k_BHND, v_BHND = (_gather(x, starts_B, position_BHN, q_BHD.shape[1]) for x in (k_BSHD, v_BSHD))
    wide = accumulation_dtype(q_BHD.dtype)
    logit_BHN = scale * (k_BHND.to(wide) @ q_BHD.to(wide)[..., None])[..., 0]
    weight_BHN = logit_BHN.masked_fill(~read_BHN, -math.inf).softmax(-1)
    weight_BHN = weight_BHN.masked_fill((position_B < 0)[:, None, None], 0)
    return (weight_BHN[..., None, :] @ v_BHND.to(wide))[..., 0, :].to(q_BHD.dtype)


def _choose_pages(q_BHD: Tensor, centroid_BPHD: Tensor, own_B: Tensor, top_k: int) -> Tensor:
    """The own page and the `top_k - 1` best before it, `[B, H, K]`; negative for none."""
    batch, heads, width = q_BHD.shape
    pages, kv_heads = centroid_BPHD.shape[1:3]
    q_BHGD = q_BHD.to(accumulation_dtype(q_BHD.dtype)).view(batch, kv_heads, heads // kv_heads, width)
    score_BHP = torch.einsum("bhgd,bphd->bhgp", q_BHGD, centroid_BPHD.to(q_BHGD.dtype)).flatten(1, 2)
    past_BP = _range(q_BHD, pages) < own_B[:, None]
    score_BHP = score_BHP.masked_fill(~past_BP[:, None], -math.inf)
    # A stable sort of the reversed pages sends ties to the later page.
    best, order = score_BHP.flip(-1).sort(dim=-1, descending=True, stable=True)
    wanted = min(top_k - 1, pages)
    past_BHK = (pages - 1 - order[..., :wanted]).masked_fill(best[..., :wanted] == -math.inf, -1)
    return torch.cat([past_BHK, own_B.long()[:, None, None].expand(-1, heads, 1)], -1)


def _gather(x_BSHD: Tensor, starts_B: Tensor, position_BHN: Tensor, heads: int) -> Tensor:
    """Each query head's cache entries at `position_BHN` within the rows, `[B, H, N, D]`."""
    batch, slots, kv_heads, _ = x_BSHD.shape
    slot_BHN = (starts_B[:, None, None] + position_BHN).clamp(0, slots - 1)
    row_B11 = _range(x_BSHD, batch)[:, None, None]
    kv_head_H1 = (_range(x_BSHD, heads) // (heads // kv_heads))[:, None]
    return x_BSHD[row_B11, slot_BHN, kv_head_H1]


def _range(like: Tensor, end: int) -> Tensor:
    return torch.arange(end, device=like.device)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_size: int,
    top_k: int,
) -> None:
    check_blocks(block_size, top_k)
    if q.dim() != 4 or not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(
            f"q must be [batch, 1..{MAX_QUERIES} tokens, heads, dim], got {tuple(q.shape)}; "
            "use moba_attention for more tokens"
        )
    batch, _, heads, width = q.shape
    if k_cache.dim() != 4 or k_cache.shape[0] != batch or k_cache.shape[3] != width:
        raise ValueError(f"k_cache must be [{batch}, slots, heads, {width}], got {tuple(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache must have k_cache's shape {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}")
    kv_heads = k_cache.shape[2]
    if heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of the cache's {kv_heads} heads")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache must share a dtype, got {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    shape = (centroids.shape[0], *centroids.shape[2:])
    if centroids.dtype != centroid_dtype(q.dtype) or shape != (batch, kv_heads, width):
        raise ValueError(
            f"centroids must be {centroid_dtype(q.dtype)} [{batch}, pages, {kv_heads}, {width}], "
            f"got {centroids.dtype} {tuple(centroids.shape)}; openmoba.ops.pages.new_centroids makes them"
        )
    for name, x in (("k_cache", k_cache), ("centroids", centroids), ("lengths", lengths), ("starts", starts)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is not None and (x.dtype != torch.int32 or x.shape != (batch,)):
            raise ValueError(f"{name} must be int32 [{batch}], got {x.dtype} {tuple(x.shape)}")
