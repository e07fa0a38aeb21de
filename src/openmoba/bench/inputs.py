"""Inputs of a case: standard normal, or with half of the queries drawn to the first block."""

# B batch, T tokens, H heads, K key/value heads, D head width, R past blocks per query

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmoba.bench.cases import Case

# A drawn query's score of block 0, in units of |centroid|: clear of the best of 10,000 random ones.
_PULL = 8.0


@dataclass(frozen=True)
class Inputs:
    """`q_BTHD`, `k_BTKD`, `v_BTKD` and the gradient of the output; None where no backward pass is asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor | None


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Make the inputs: the same tensors for the same case on the same kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(heads: int) -> Tensor:
        shape = (case.batch, case.tokens, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    q, k, v = randn(case.heads), randn(case.kv_heads), randn(case.kv_heads)
    if case.routing == "skewed":
        drawn_BTH = torch.rand(q.shape[:3], generator=generator, device=device) < 0.5
        centroid_BKD = k[:, : case.block_size].mean(1, dtype=torch.float32)
        pull_BKD = (_PULL * centroid_BKD / centroid_BKD.norm(dim=-1, keepdim=True)).to(q.dtype)
        pull_BHD = pull_BKD.repeat_interleave(case.heads // case.kv_heads, dim=1)
        q += drawn_BTH[..., None] * pull_BHD[:, None]
    d_out = randn(case.heads) if case.backward else None
    q, k, v = (x.requires_grad_(case.backward) for x in (q, k, v))
    return Inputs(q, k, v, d_out)


def first_block_share(selected_BTHR: Tensor) -> float:
    """Measure the share of all queries, over all heads, that chose block 0 as a past block."""
    return float((selected_BTHR == 0).any(-1).double().mean())
