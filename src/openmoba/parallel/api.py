"""The operations over a process group: each rank calls them with its shard, and gets its shard of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from openmoba.ops import api as ops
from openmoba.ops.autocast import lowered
from openmoba.ops.checks import check_scale, check_tensors
from openmoba.ops.varlen import dense_sequences
from openmoba.parallel.alike import check_alike
from openmoba.parallel.heads import Attend, attend_by_heads
from openmoba.parallel.keys import attend_by_keys
from openmoba.parallel.sharding import Sharding

# B batch, S tokens of a shard, H heads, D head width


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: Sharding,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `openmoba.moba_attention` of a sequence that lies over several ranks, which all call this together.

    Queries choose among the blocks of the whole sequence; output and gradients are those of one device, up to the
    order of sums, by heads bit for bit where the ranks divide the key/value heads.

    Args:
        q: this rank's queries `[B, S, H, D]`, of packed sequences `[S, H, D]`; S is `sharding.local_tokens`.
        k: this rank's keys, Hkv heads; v: values, the shape of k.
        sharding: how the whole lies over the ranks, and where packed sequences begin in it.
        block_size, top_k, scale, impl: as in `openmoba.moba_attention`.

    Returns:
        This rank's output, shape and dtype of q; what stands at padding has no meaning.

    Raises:
        ValueError: naming the argument, its value and the way out. On a CPU it comes on all ranks where their shapes,
            dtypes or shardings differ; on a GPU these are not compared, as the host would wait for the device.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
        return ops.moba_attention(
            q,
            k,
            v,
            block_size=block_size,
            top_k=top_k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            scale=scale,
            impl=impl,
        )

    return over_ranks(attend, q, k, v, sharding)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    sharding: Sharding,
    *,
    block_size: int,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `openmoba.block_attention` of a sequence that lies over several ranks; arguments as in `moba_attention`.

    Args:
        blocks: for this rank's queries, int32 `[B, S, H or Hkv, m]`, of packed sequences `[S, H or Hkv, m]`: past
            blocks of the whole, numbered within the sequence, -1 for none; m is that of every rank. What stands at
            padding is not looked at.
    """

    check_tensors(blocks=blocks)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lists: Tensor) -> Tensor:
        return ops.block_attention(
            q, k, v, lists, block_size=block_size, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=scale, impl=impl
        )

    return over_ranks(attend, q, k, v, sharding, blocks)


def full_attention(q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, *, scale: float | None = None) -> Tensor:
    """Compute full causal attention of a sequence that lies over several ranks; arguments as in `moba_attention`."""
    factor = check_scale(q, scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
        if cu_q is None or cu_k is None:
            return ops.moba_attention(q, k, v, block_size=k.shape[1], top_k=1, scale=factor)  # one block holds all
        return dense_sequences(q, k, v, cu_q, cu_k, k.shape[0], factor)

    return over_ranks(attend, q, k, v, sharding)


def over_ranks(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, lists: Tensor | None = None
) -> Tensor:
    """Compute any attention, causal over whole sequences, of one that lies over several ranks.

    Args:
        attend: the attention of one device, `(q, k, v, cu_seqlens_q, cu_seqlens_k) -> out`, of rows where the
            boundaries are None. It is given some of the heads, or queries that are the last of their keys.
        q, k, v, sharding: as in `moba_attention`.
        lists: what else there is for every query, `[B, S, H or Hkv, m]`; `attend` is given its part last.
    """
    packed = sharding.cu_seqlens is not None
    check_tensors(q=q, k=k, v=v)
    check_alike(sharding, q=q, k=k, v=v, lists=lists)
    _check(q, k, v, sharding)
    if lists is not None and (lists.shape[:-2] != q.shape[:-2] or lists.shape[-2] not in (q.shape[-2], k.shape[-2])):
        raise ValueError(
            f"lists of shape {tuple(lists.shape)} do not fit q's {tuple(q.shape)} and k's {k.shape[-2]} heads; give "
            "every query one for each head, or for each key/value head"
        )
    device = q.device.type
    if torch.is_autocast_enabled(device):  # half the bytes to send
        q, k, v = (lowered(x, torch.get_autocast_dtype(device)) for x in (q, k, v))
    if packed:
        q, k, v = (x[None] for x in (q, k, v))
        lists = None if lists is None else lists[None]
    by_heads = sharding.resolved(q.shape[2], k.shape[2]) == "heads"
    out = (attend_by_heads if by_heads else attend_by_keys)(attend, q, k, v, sharding, lists)
    return out[0] if packed else out


def _check(q: Tensor, k: Tensor, v: Tensor, sharding: Sharding) -> None:
    """Raise ValueError unless these are this rank's shard."""
    packed = sharding.cu_seqlens is not None
    dims, layout = (3, "[tokens, heads, dim]") if packed else (4, "[batch, tokens, heads, dim]")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {q.dtype}; cast them to one dtype")
        if x.dim() != dims:
            way_out = "the sharding has cu_seqlens" if packed else "packed sequences need a sharding with cu_seqlens"
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}; {way_out}")
        sharding.check_shard(name, x.shape[-3])
    if (*q.shape[:-3], q.shape[-1]) != (*k.shape[:-3], k.shape[-1]):
        raise ValueError(
            f"q of shape {tuple(q.shape)} and k of {tuple(k.shape)} must have one batch and one head width"
        )
    if k.shape != v.shape or q.shape[-2] % max(1, k.shape[-2]):
        raise ValueError(
            f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}, and q's {q.shape[-2]} heads must be a "
            f"multiple of k's {k.shape[-2]}"
        )
