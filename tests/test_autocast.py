"""Autocast and the scale, as users of scaled_dot_product_attention know them."""

import math

import pytest
import torch

from openmoba import (
    complete_paged,
    complete_pages,
    moba_attention,
    moba_decode,
    moba_paged,
    new_centroids,
    new_paged_centroids,
)


def test_autocast_casts_inputs_and_nothing_else(randn):
    q, k, v = (randn(1, 40, heads, 16, dtype=torch.float32, grad=True) for heads in (4, 2, 2))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moba_attention(q, k, v, block_size=8, top_k=2)
    assert torch.equal(out, moba_attention(*low, block_size=8, top_k=2))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_over_a_cache_autocast_changes_nothing(randn):
    q, k, v = (randn(2, tokens, heads, 16, dtype=torch.float32) for tokens, heads in ((2, 4), (40, 2), (40, 2)))
    lengths, settings = torch.tensor([40, 23], dtype=torch.int32), {"block_size": 8, "top_k": 2}
    centroids = new_centroids(k, 40, 8)
    complete_pages(centroids, k, lengths, None, 40, 8)
    pages, table = [x.view(10, 8, 2, 16) for x in (k, v)], torch.arange(10, dtype=torch.int32).view(2, 5)
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    in_pages = new_paged_centroids(pages[0], 8)
    complete_paged(in_pages, pages[0], table, lengths, torch.tensor([0, 40, 63], dtype=torch.int32), 8)
    alone = moba_decode(q, k, v, centroids, lengths, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moba_decode(q, k, v, centroids, lengths, **settings), alone)
        paged = moba_paged(q.flatten(0, 1), *pages, in_pages, table, lengths, starts, **settings)
    torch.testing.assert_close(paged.view_as(alone), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0, -0.5, math.inf, math.nan, "0.1", True])
def test_scale_must_be_positive(randn, scale):
    q, k, v = randn(1, 4, 1, 8), randn(1, 4, 1, 8), randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="scale must be an int or float, positive and finite"):
        moba_attention(q, k, v, block_size=2, top_k=1, scale=scale)
