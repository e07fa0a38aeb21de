"""Key convolution of one sequence over several devices: a chunk's first tokens see the last keys of the chunk before.

    contiguous, three ranks    rank 1 needs the last W - 1 keys of chunk 0, which rank 0 holds
    head-tail, three ranks     rank 1 holds chunks 1 and 4, and needs those of chunks 0 and 3: of ranks 0 and 2

Every rank sends the ends of its chunks to all, few tokens that they are, and takes what it needs; so a chunk may be
shorter than the convolution is wide. What comes back in the backward pass are the gradients of these ends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from openmoba.ops import key_conv as ops
from openmoba.ops.checks import DTYPES, check_tensors
from openmoba.ops.eager import eager
from openmoba.parallel.alike import check_alike
from openmoba.parallel.collectives import Exchange, arrived, started
from openmoba.parallel.sharding import Sharding

# B batch, S tokens of a shard, N ranks, C channels of all key/value heads, W width


def key_convolution(k: Tensor, weight_CW: Tensor, sharding: Sharding) -> Tensor:
    """Compute `openmoba.ops.key_conv.key_convolution` of a sequence that lies over several ranks, which all call this.

    Args:
        k: this rank's keys as projected, before norm and rotation, `[B, S, C]`; of packed sequences `[S, C]`.
        weight_CW: one filter per channel, the same on every rank. Its gradient is that of this rank's tokens.
        sharding: how the whole lies over the ranks, and where packed sequences begin in it.

    Returns:
        This rank's convolved keys, shape and dtype of k; what stands at padding has no meaning.

    Raises:
        ValueError: naming the argument, its value and the way out; as of `openmoba.parallel.moba_attention`.
    """
    check_tensors(k=k, weight_CW=weight_CW)
    check_alike(sharding, k=k, weight_CW=weight_CW)
    packed = sharding.cu_seqlens is not None
    dims, layout = (2, "[tokens, channels]") if packed else (3, "[batch, tokens, channels]")
    if k.dim() != dims:
        way_out = "the sharding has cu_seqlens" if packed else "packed sequences need a sharding with cu_seqlens"
        raise ValueError(f"k must be {layout}, got shape {tuple(k.shape)}; {way_out}")
    sharding.check_shard("k", k.shape[-2])
    for name, x in (("k", k), ("weight_CW", weight_CW)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; use float64, float32, float16 or bfloat16")
    if weight_CW.dim() != 2 or weight_CW.shape[0] != k.shape[-1]:
        raise ValueError(
            f"weight_CW must be [channels, width] with k's {k.shape[-1]} channels, got {tuple(weight_CW.shape)}"
        )
    k_BSC, reach = (k[None] if packed else k), weight_CW.shape[1] - 1
    parts_BPLC = k_BSC.reshape(k_BSC.shape[0], sharding.per_rank, sharding.chunk, -1)
    before_BPRC = _ends_before(parts_BPLC, reach, sharding)
    goes_on = _goes_on(sharding, reach)  # of rows that lie beside each other here: the chunks
    return ops.key_convolution(parts_BPLC.flatten(0, 1), weight_CW, goes_on, before_BPRC.flatten(0, 1)).view_as(k)


# P chunks of a rank, L tokens of a chunk, R = W - 1 keys before it, E = min(R, L) keys at its end


def _ends_before(parts_BPLC: Tensor, reach: int, sharding: Sharding) -> Tensor:
    """Return the `reach` keys before each of this rank's chunks, `[B, P, R, C]`; zeros before the first token."""
    end = min(reach, sharding.chunk)
    ends_XBC = parts_BPLC[:, :, sharding.chunk - end :].permute(1, 2, 0, 3).flatten(0, 1)
    in_order = pad(sharding.in_order(_of_all(ends_XBC, sharding).flatten(0, 1)), (0, 0, 0, 0, reach, 0))
    return torch.stack([in_order[c * end : c * end + reach] for c in sharding.own_chunks]).permute(2, 0, 1, 3)


@eager("compilers do not trace transfers")
def _of_all(x: Tensor, sharding: Sharding) -> Tensor:
    """Return the `x` of all ranks, `[N, *x.shape]`."""
    exchange = Exchange(sharding.group)
    (got,) = arrived(exchange, *started(exchange, x.expand(sharding.ranks, *x.shape)))
    return got


def _goes_on(sharding: Sharding, reach: int) -> Tensor | None:
    """Return which tokens go on with the sequence of the one before, with the keys before them, bool `[P, R + L]`."""
    if sharding.cu_seqlens is None:
        return None
    slots = reach + sharding.ranks * sharding.local_tokens + 1  # the last for a sequence that would begin behind all
    goes_on = torch.ones(slots, dtype=torch.bool, device=sharding.cu_seqlens.device)
    goes_on = goes_on.index_fill(0, sharding.cu_seqlens.long() + reach, False)
    chunk = sharding.chunk
    return torch.stack([goes_on[c * chunk : (c + 1) * chunk + reach] for c in sharding.own_chunks])
