"""Autocast and the scale, as users of scaled_dot_product_attention know them."""

import math

import pytest
import torch

from openmoba import moba_attention


def test_autocast_casts_inputs_and_nothing_else(randn):
    q, k, v = (randn(1, 40, heads, 16, dtype=torch.float32, grad=True) for heads in (4, 2, 2))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moba_attention(q, k, v, block_size=8, top_k=2)
    assert torch.equal(out, moba_attention(*low, block_size=8, top_k=2))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("scale", [0, -0.5, math.inf, math.nan, "0.1", True])
def test_scale_must_be_positive(randn, scale):
    q, k, v = randn(1, 4, 1, 8), randn(1, 4, 1, 8), randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="scale must be a positive finite number"):
        moba_attention(q, k, v, block_size=2, top_k=1, scale=scale)
