"""The public operation: contract and checks. `openmoba.ops.backends` says what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openmoba.ops.attend import attend, select
from openmoba.ops.backends import implementation
from openmoba.ops.checks import check_call, check_scale, refuse_forward_mode
from openmoba.ops.dense import dense_attention
from openmoba.ops.reference import reference_attention, reference_select


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call runs, and why.

    Attributes:
        impl: "reference", "cpu" or "triton".
        path: "mask" (dense mask, softmax in torch), "dense" (causal attention, the same function when `top_k`
            covers all blocks), or "blocks" (only chosen blocks are read).
        reason: one sentence.
    """

    impl: str
    path: str
    reason: str


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention over each query's own block and its `top_k - 1` best past blocks.

    Query t scores a past block by the inner product with the block's mean key; one softmax runs over the
    keys of all blocks read. Keys read with 6 tokens, block_size=2, top_k=2:

        query 4:  . . 1 1 1 .    (block 1 outscored block 0)
        query 5:  1 1 . . 1 1    (block 0 outscored block 1)

    Args:
        q: queries `[B, Tq, H, D]`, or packed `[sum Tq, H, D]`; fp32, fp16, bf16 (fp64: reference). Queries
            are the last Tq positions of their keys, so `Tq <= Tk` (chunked prefill, decoding).
        k: keys `[B, Tk, Hkv, D]` or packed `[sum Tk, Hkv, D]`; H must be a multiple of Hkv; D from 8 to 256.
        v: values, the shape of k.
        block_size: tokens per block; any length and any block size >= 1 go together.
        top_k: blocks read per query and head, the own block included; 1 is block-local attention, and as many
            as there are blocks is full causal attention.
        cu_seqlens_q: int32 `[sequences + 1]`, where each packed sequence starts in q; blocks restart there.
        cu_seqlens_k: the same for k and v.
        scale: factor on the logits, > 0, `D**-0.5` by default.
        impl: "auto", "reference", "cpu" or "triton"; an explicit choice never falls back.

    Under autocast the inputs are cast to its dtype, as `scaled_dot_product_attention` does.

    Returns:
        The attention output, shape and dtype of q. Gradients flow to q, k and v, none through the choice.

    Raises:
        ValueError: naming the argument, its value and the way out. On CUDA the values inside `cu_seqlens_*`
            are asserted on the device, without waiting for it.

    Source: arXiv 2502.13189, equations 2 to 6.
    """
    low = _autocast_dtype(q)
    if low is not None:
        q, k, v = (_lowered(x, low) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):  # precision inside is the implementation's own
            return moba_attention(
                q,
                k,
                v,
                block_size=block_size,
                top_k=top_k,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                scale=scale,
                impl=impl,
            )
    check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    run, _ = implementation(q, impl)
    path = _path(run, k, cu_seqlens_k, block_size, top_k)
    scale = check_scale(q, scale)
    if path == "mask":
        return reference_attention(q, k, v, None, cu_seqlens_q, cu_seqlens_k, block_size, top_k, scale)[0]
    refuse_forward_mode(q, k, v)
    if q.numel() == 0:
        return q * (k.sum() + v.sum())  # empty, and every gradient exists
    if path == "dense":
        return dense_attention(q, k, v, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if cu_seqlens_k is not None and top_k * block_size > k.shape[0]:
        top_k = -(-k.shape[0] // block_size)  # no sequence has more blocks to choose from
    return attend(run, q, k, v, None, cu_seqlens_q, cu_seqlens_k, block_size, top_k, scale)[0]


def moba_select(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The past blocks every query reads, best first: int32 `[..., H, top_k - 1]`, -1 for none.

    Arguments as in `moba_attention`. Blocks are numbered within their sequence. Equal scores go to the later
    block. The own block is always read and not listed. Not differentiable. Under autocast it is the choice of
    `moba_attention`, among inputs in autocast's dtype.
    """
    low = _autocast_dtype(q)
    if low is not None:
        q, k = _lowered(q, low), _lowered(k, low)
        with torch.autocast(q.device.type, enabled=False):  # scores are summed in fp32
            return moba_select(
                q,
                k,
                block_size=block_size,
                top_k=top_k,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                impl=impl,
            )
    check_call(q, k, None, cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    run, _ = implementation(q, impl)
    q, k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k))
    if run == "reference":
        return reference_select(q, k, cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    if q.numel() == 0 or top_k == 1:
        return q.new_empty((*q.shape[:-1], top_k - 1), dtype=torch.int32)
    return select(run, q, k, cu_seqlens_q, cu_seqlens_k, block_size, top_k)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Explanation:
    """Say which implementation `moba_attention` would run with these arguments, and why; runs nothing.

    Under autocast that is of inputs in its dtype, as `moba_attention` casts them.
    """
    low = _autocast_dtype(q)
    if low is not None:
        q, k, v = (_lowered(x, low, torch.empty_like) for x in (q, k, v))
    check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    run, reason = implementation(q, impl)
    path = _path(run, k, cu_seqlens_k, block_size, top_k)
    if path == "dense":
        blocks = -(-k.shape[1] // block_size)
        reason += f"; top_k={top_k} covers all {blocks} blocks, where MoBA is causal attention"
    elif path == "blocks":
        reason += f"; each query reads at most {top_k} blocks of {block_size} keys"
        if run == "triton":
            reason += f"; {_kernels(q, k, v, cu_seqlens_q, block_size, top_k)}"
    return Explanation(run, path, reason)


def _autocast_dtype(q: Tensor) -> torch.dtype | None:
    """What autocast has attention computed in on q's device; None where it is off, or q is no tensor."""
    device = q.device.type if isinstance(q, Tensor) else "meta"
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _lowered(x: Tensor, dtype: torch.dtype, cast: Callable[..., Tensor] = Tensor.to) -> Tensor:
    """What autocast makes of an input of SDPA: fp64, and what is no float, stay."""
    lowers = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return cast(x, dtype=dtype) if lowers else x


def _kernels(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, block_size: int, top_k: int) -> str:
    """Which kernels attend to past blocks."""
    from openmoba.ops.triton import families  # importing openmoba needs torch alone
    from openmoba.ops.triton.geometry import Geometry

    return families.explain(Geometry.of(q, k, cu_q, block_size, top_k), q, k, v)


def _path(run: str, k: Tensor, cu_k: Tensor | None, block_size: int, top_k: int) -> str:
    """`Explanation.path` of an implementation; without text, as lengths may be symbols of a compiler."""
    if run == "reference":
        return "mask"
    return "dense" if cu_k is None and k.shape[1] <= top_k * block_size else "blocks"
