"""The public verbs over whole sequences: choosing, attending, merging. Contract and checks.

`openmoba.ops.reference` defines what they compute, `openmoba.ops.backends` says what runs them, and
`openmoba.ops.attend` is where torch learns of them. Decoding is in `openmoba.ops.decode`, over a block table in
`openmoba.ops.paged`; `openmoba` has all public names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.attend import attend, select
from openmoba.ops.autocast import autocast_dtype, lowered
from openmoba.ops.backends import implementation
from openmoba.ops.checks import (
    check_call,
    check_given,
    check_given_shape,
    check_parts,
    check_scale,
    refuse_forward_mode,
)
from openmoba.ops.dense import dense_attention
from openmoba.ops.explain import path_of
from openmoba.ops.reference import reference_attention, reference_merge, reference_select


class _Options(TypedDict, total=False):
    """What both kinds of attention take alike, for type checkers; the functions themselves have the defaults."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    scale: float | None
    impl: str


@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, top_k: int, return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, top_k: int, return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention over each query's own block and its `top_k - 1` best past blocks.

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
        return_lse: also return the log-sum-exp of each query's scaled logits, natural, fp32 (fp64 for fp64)
            `q.shape[:-1]`, for `merge_attention`; differentiable.
        impl: "auto", "reference", "cpu" or "triton"; an explicit choice never falls back.

    Under autocast the inputs are cast to its dtype, as `scaled_dot_product_attention` does.

    Returns:
        The attention output, shape and dtype of q, or with `return_lse` output and log-sum-exp. Gradients flow
        to q, k and v, none through the choice.

    Raises:
        ValueError: naming the argument, its value and the way out. On CUDA the values inside `cu_seqlens_*`
            are asserted on the device, without waiting for it.

    Source: arXiv 2502.13189, equations 2 to 6.
    """
    blocking = Blocking(cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    out, lse = _attention(q, k, v, None, blocking, scale, return_lse=return_lse, impl=impl)
    return out if lse is None else (out, lse)


@overload
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
@overload
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention over each query's own block and the past blocks that a list names.

    `moba_attention` is this with the blocks of `moba_select`. The list may come from anything else: a learned
    indexer, a router of one's own.

    Args:
        q, k, v, block_size, cu_seqlens_q, cu_seqlens_k, scale, return_lse, impl: as in `moba_attention`.
        blocks: int32 `[B, Tq, H or Hkv, m]`, or packed `[sum Tq, H or Hkv, m]`, any m >= 0: past blocks to read,
            numbered within the sequence, per query head or per key/value head for the query heads that share it;
            in any order, -1 for none. A repeated block counts once. The own block is always read and not listed.

    Returns:
        As `moba_attention`. Gradients flow to q, k and v; a list has none.

    Raises:
        ValueError: as `moba_attention`; and for a block that is the own one, a later one, or below -1. On CUDA
            such a block is asserted against on the device, without waiting for it.
    """
    blocking = Blocking(cu_seqlens_q, cu_seqlens_k, block_size, check_given_shape(q, k, blocks) + 1)
    out, lse = _attention(q, k, v, blocks, blocking, scale, return_lse=return_lse, impl=impl)
    return out if lse is None else (out, lse)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    blocking: Blocking,
    scale: float | None,
    *,
    return_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    """Check a call and run it; the log-sum-exp is None unless asked for."""
    low = autocast_dtype(q)
    if low is not None:
        q, k, v = (lowered(x, low) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):  # precision inside is the implementation's own
            return _attention(q, k, v, blocks, blocking, scale, return_lse=return_lse, impl=impl)
    check_call(q, k, v, blocking)
    run, _ = implementation(q, impl)
    path = path_of(run, k, blocking, given=blocks is not None)
    scale = check_scale(q, scale)
    if path != "mask":
        refuse_forward_mode(q, k, v)
    if q.numel() == 0:
        out = q * (k.sum() + v.sum())  # empty, and every gradient exists
        return out, out.sum(-1, dtype=torch.promote_types(out.dtype, torch.float32)) if return_lse else None
    if path == "mask":
        out, lse = _by_mask(q, k, v, blocks, blocking, scale)
        return out, lse if return_lse else None
    cu_q, cu_k, block_size, top_k = blocking
    if path == "dense":
        if not return_lse:
            return dense_attention(q, k, v, scale), None
        block_size, top_k = k.shape[1], 1  # one block, which every query owns
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if blocks is None and cu_k is not None and top_k * block_size > k.shape[0]:
        top_k = -(-k.shape[0] // block_size)  # no sequence has more blocks to choose from
    out, lse, _ = attend(run, q, k, v, blocks, Blocking(cu_q, cu_k, block_size, top_k), scale)
    return out, lse if return_lse else None


def _by_mask(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, blocking: Blocking, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by the reference, which lists as many blocks as it is asked for."""
    if blocks is not None:
        check_given(blocks, q, k, blocking)
    else:
        most = 1 + k.shape[-3] // blocking.block_size  # there are no more past blocks to list
        blocking = blocking._replace(top_k=min(blocking.top_k, most))
    return reference_attention(q, k, v, blocks, blocking, scale)


def merge_attention(outs: Iterable[Tensor], lses: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge the attention of the same queries over several sources of keys into that over all of them.

        out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i)

    Where no key is in two sources that is one softmax over the keys of all: of the chunks of a sequence that lies
    over several processes, of a shared prompt and what follows it, of a cache and new tokens.

    Args:
        outs: outputs of one shape and dtype, `[..., H, D]`, at least one.
        lses: their log-sum-exps `[..., H]`, fp32 or fp64, natural; `-inf` where a source has no key for a query;
            its output is not read there.

    Returns:
        Output and log-sum-exp, in the dtypes of the first; zeros and `-inf` where no source has a key. Differentiable
        any number of times.

    Raises:
        ValueError: naming the argument and its value.
    """
    outs, lses = (list(x) if isinstance(x, Iterable) else [x] for x in (outs, lses))
    check_parts(outs, lses)
    return reference_merge(outs, lses)


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
    """Choose the past blocks that every query reads, best first: int32 `[..., H, top_k - 1]`, -1 for none.

    Arguments as in `moba_attention`. Blocks are numbered within their sequence. Equal scores go to the later
    block. The own block is always read and not listed. Not differentiable. Under autocast it is the choice of
    `moba_attention`, among inputs in autocast's dtype.
    """
    low = autocast_dtype(q)
    if low is not None:
        q, k = lowered(q, low), lowered(k, low)
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
    blocking = Blocking(cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    check_call(q, k, k, blocking)
    run, _ = implementation(q, impl)
    q, k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k))
    if run == "reference":
        return reference_select(q, k, blocking)
    if q.numel() == 0 or top_k == 1:
        return q.new_empty((*q.shape[:-1], top_k - 1), dtype=torch.int32)
    return select(run, q, k, blocking)
