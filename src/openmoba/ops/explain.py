"""Which implementation a call runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.autocast import autocast_dtype, lowered
from openmoba.ops.backends import implementation
from openmoba.ops.checks import check_call, check_given_shape


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


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None = None,
    *,
    block_size: int,
    top_k: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Say which implementation a call would run with these arguments, and why; runs nothing.

    The call is `moba_attention` with `top_k`, or `block_attention` with `blocks`. Under autocast it is that of inputs
    in autocast's dtype, as both cast them.
    """
    if (blocks is None) == (top_k is None):
        raise ValueError("explain takes blocks, of block_attention, or top_k, of moba_attention: one of them")
    low = autocast_dtype(q)
    if low is not None:
        q, k, v = (lowered(x, low, torch.empty_like) for x in (q, k, v))
    if blocks is not None:
        top_k = check_given_shape(q, k, blocks) + 1
    assert top_k is not None
    blocking = Blocking(cu_seqlens_q, cu_seqlens_k, block_size, top_k)
    check_call(q, k, v, blocking)
    run, reason = implementation(q, impl)
    path = path_of(run, k, blocking, given=blocks is not None)
    if path == "dense" and return_lse:
        path = "blocks"
        reason += f"; top_k={top_k} covers all blocks: one block of {k.shape[1]} keys, with a log-sum-exp"
    elif path == "dense":
        count = -(-k.shape[1] // block_size)
        reason += f"; top_k={top_k} covers all {count} blocks, where MoBA is causal attention"
    elif path == "blocks":
        reason += f"; each query reads at most {top_k} blocks of {block_size} keys"
        if run == "triton":
            most = min(top_k, -(-k.shape[-3] // block_size))  # of more, a list repeats some or says none
            reason += f"; {_kernels(q, k, v, cu_seqlens_q, block_size, most)}"
    return Explanation(run, path, reason)


def path_of(run: str, k: Tensor, blocking: Blocking, *, given: bool) -> str:
    """Return `Explanation.path` of an implementation; without text, as lengths may be symbols of a compiler.

    `given`: blocks are, so that a query need not read all of them.
    """
    if run == "reference":
        return "mask"
    covered = blocking.cu_k is None and k.shape[1] <= blocking.top_k * blocking.block_size
    return "dense" if not given and covered else "blocks"


def _kernels(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, block_size: int, top_k: int) -> str:
    """Tell which kernels attend to past blocks."""
    from openmoba.ops.triton import families  # importing openmoba needs torch alone
    from openmoba.ops.triton.geometry import Geometry

    return families.explain(Geometry.of(q, k, cu_q, block_size, top_k), q, k, v)
