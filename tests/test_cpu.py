"""The CPU path where drawn cases do not reach: full-size tiles, extreme routing, repeatability, memory, odd input."""

import math

import pytest
import torch
from oracle import assert_as_exact_as_plain, with_gradients
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from openmoba import block_attention, moba_attention, moba_select
from openmoba.ops import cpu, selection, tiles
from openmoba.ops.arguments import Blocking
from openmoba.ops.reference import attention_given_selection

CPU = {"impl": "cpu"}


@pytest.fixture
def normal(randn):
    def make(*shape, dtype=torch.float32, grad=False):
        return randn(*shape, dtype=dtype, grad=grad)

    return make


def call(normal, tokens, heads=4, kv_heads=2, width=16, dtype=torch.float32):
    """q, k, v with gradients, and the gradient of the output."""
    sizes = heads, kv_heads, kv_heads
    return [normal(1, tokens, n, width, dtype=dtype, grad=True) for n in sizes], normal(
        1, tokens, heads, width, dtype=dtype
    )


def assert_exact(inputs, d_out, **settings):
    tensors = [*inputs, d_out]
    actual = with_gradients(lambda q, k, v: moba_attention(q, k, v, **settings, **CPU), tensors)
    selected = moba_select(*inputs[:2], **settings, **CPU)
    assert_as_exact_as_plain(actual, tensors, selected, settings["block_size"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_size(normal, dtype):
    """2000 tokens of 4 heads give the first blocks more rows than the largest tile."""
    inputs, d_out = call(normal, 2000, dtype=dtype)
    selected = moba_select(*inputs[:2], block_size=64, top_k=4, **CPU)
    assert (selected == 0).sum() > 2 * tiles.TILE_ROWS[0]
    assert_exact(inputs, d_out, block_size=64, top_k=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_size", [3, 16, 20])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_is_no_number_gives_none(normal, dtype, top_k, block_size, bad):
    """In blocks and ends of sequences with fewer keys than a vector register holds, too; other rows are as ever."""
    (q, k, v), _ = call(normal, 23, dtype=dtype)
    settings = {"block_size": block_size, "top_k": top_k, "return_lse": True, **CPU}
    expected = moba_attention(q, k, v, **settings)
    rows = torch.zeros(1, 23, 4, dtype=torch.bool)
    rows[:, [0, 2, 9, 22], [0, 1, 2, 3]] = True
    column = torch.arange(16) == 5
    broken = q.detach().masked_fill(rows[..., None] & column, bad).requires_grad_()
    out, lse = moba_attention(broken, k, v, **settings)
    assert torch.equal(out.isnan(), rows[..., None].expand_as(out))
    assert torch.equal(~lse.isfinite(), rows)
    assert torch.equal(out[~rows], expected[0][~rows])
    (d_q,) = torch.autograd.grad(out.sum(), broken)
    assert torch.equal(d_q.isnan().any(-1), rows)


@pytest.mark.parametrize("size", [4, 20])
def test_blocks_without_weight(normal, size):
    """Whose logits are all `-inf`: blocks that were chosen, and the first keys of the own block."""
    (q, k, v), _ = call(normal, 4 * size + 3)
    weightless = torch.zeros(4 * size + 3, dtype=torch.bool)
    weightless[size : 2 * size] = weightless[3 * size : 3 * size + 2] = True
    with torch.no_grad():
        q[..., 0] = 1
        k[..., 0] = 0
        k[:, weightless, :, 0] = -math.inf
    blocks = torch.tensor([0, 1]).int().expand(1, len(weightless), 2, 2)
    own = torch.arange(len(weightless))[:, None, None] // size
    settings = {"blocks": blocks.masked_fill(blocks >= own, -1), "block_size": size, "return_lse": True}
    out, lse = block_attention(q, k, v, **settings, **CPU)
    expected, expected_lse = block_attention(q, k, v, **settings, impl="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_every_query_choosing_the_same_block(normal):
    inputs, d_out = call(normal, 300)
    with torch.no_grad():
        q, k, _ = inputs
        k[:, 32:48] += 2
        q += 2
    selected = moba_select(*inputs[:2], block_size=16, top_k=2, **CPU)
    assert (selected[:, 48:] == 2).all()
    assert_exact(inputs, d_out, block_size=16, top_k=2)


def test_enough_blocks_is_dense(normal):
    inputs, d_out = call(normal, 61)
    out = moba_attention(*inputs, block_size=10, top_k=7, **CPU)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    blocks = torch.ops.openmoba.attend("cpu", *inputs, None, None, None, 10, 7, 0.25)[0]
    torch.testing.assert_close(out, dense, atol=0, rtol=0)
    torch.testing.assert_close(blocks, dense, atol=1e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(blocks, inputs, d_out), torch.autograd.grad(dense, inputs, d_out), strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 30])
def test_enough_blocks_is_dense_with_fewer_queries(normal, queries):
    (q, k, v), d_out = call(normal, 31)
    whole = moba_attention(q, k, v, block_size=8, top_k=4, **CPU)[:, -queries:]
    part = moba_attention(q[:, -queries:], k, v, block_size=8, top_k=4, **CPU)
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)
    d_out = d_out[:, -queries:]
    for a, b in zip(
        torch.autograd.grad(part, (q, k, v), d_out), torch.autograd.grad(whole, (q, k, v), d_out), strict=True
    ):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_one_block_is_block_local(normal):
    (q, k, v), _ = call(normal, 23)
    out = moba_attention(q, k, v, block_size=5, top_k=1, **CPU)
    local = [
        moba_attention(q[:, a : a + 5], k[:, a : a + 5], v[:, a : a + 5], block_size=5, top_k=1)
        for a in range(0, 23, 5)
    ]
    torch.testing.assert_close(out, torch.cat(local, dim=1), atol=1e-6, rtol=1e-5)


def test_ties_go_to_the_later_block(normal):
    q, k = normal(1, 40, 2, 8), normal(1, 1, 1, 8).expand(1, 40, 1, 8)
    selected = moba_select(q, k, block_size=4, top_k=4, **CPU)
    own = torch.arange(40) // 4
    expected = torch.stack([own - rank for rank in (1, 2, 3)], dim=-1).clamp(min=-1).int()
    assert torch.equal(selected, expected[None, :, None].expand_as(selected))


def test_negative_zero_ties_with_zero():
    q, k = torch.full((1, 4, 1, 8), 1e-30), torch.zeros(1, 4, 1, 8)
    k[:, 1] = -1e-30  # the score, -8e-60, rounds to -0.0
    assert moba_select(q, k, block_size=1, top_k=2, **CPU).flatten().tolist() == [-1, 0, 1, 2]


def test_a_block_whose_score_is_minus_infinity_is_not_chosen():
    q, k = torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8)
    k[:, 0] = -math.inf
    for impl in ("cpu", "reference"):
        assert moba_select(q, k, block_size=1, top_k=3, impl=impl).flatten().tolist() == [-1, -1, -1, -1, 1, -1]


@pytest.mark.parametrize("offset", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_is_that_of_fp64(normal, dtype, offset):
    """fp32 sums and scores lose nothing that matters, a common offset of the keys included."""
    q, k = normal(1, 1024, 4, 64).to(dtype), (normal(1, 1024, 4, 64) + offset).to(dtype)
    selected = moba_select(q, k, block_size=32, top_k=4, **CPU)
    oracle = moba_select(q.double(), k.double(), block_size=32, top_k=4, impl="reference")
    assert (selected != oracle).float().mean() <= 0.0002


def test_many_parts_add_up_in_fp32(normal, monkeypatch):
    """Sixty parts add to the keys of block 0; the sum is as exact as if it were rounded to bfloat16 once."""
    monkeypatch.setattr(tiles, "PARTIALS_AT_ONCE", 2**5)
    monkeypatch.setattr(tiles, "ROWS_PER_BLOCK", 1)
    inputs, d_out = call(normal, 512, heads=1, kv_heads=1, dtype=torch.bfloat16)
    with torch.no_grad():
        inputs[0] += 1
        inputs[1][:, :8] += 1
    out = moba_attention(*inputs, block_size=8, top_k=2, **CPU)
    gradients = torch.autograd.grad(out, inputs, d_out.abs())
    selected = moba_select(*inputs[:2], block_size=8, top_k=2, **CPU)
    oracle = with_gradients(
        lambda q, k, v: attention_given_selection(q, k, v, selected, 8, 0.25),
        [x.double() for x in (*inputs, d_out.abs())],
    )
    for actual, expected in zip(gradients[1:], oracle[2:], strict=True):
        one_rounding = torch.finfo(torch.bfloat16).eps / 12**0.5
        assert (actual.double() - expected).norm() <= one_rounding * expected.norm()


@pytest.mark.parametrize("changed", [1, 37, 64, 149])
def test_a_later_token_changes_nothing_before_it(normal, changed):
    (q, k, v), _ = call(normal, 150)
    before = moba_attention(q, k, v, block_size=8, top_k=3, **CPU)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, changed:] = -3 * x[:, changed:] + 1
    after = moba_attention(q, k, v, block_size=8, top_k=3, **CPU)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


def test_two_runs_give_the_same_bits(normal):
    inputs, d_out = call(normal, 500)

    def run():
        out = moba_attention(*inputs, block_size=16, top_k=4, **CPU)
        return [out, *torch.autograd.grad(out, inputs, d_out)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_strided_inputs_and_gradients(normal):
    """[B, H, T, D] as transformers has it, a last dimension that is not contiguous, an expanded gradient."""
    inputs = [normal(2, n, 50, 16, grad=True).transpose(1, 2) for n in (4, 2, 2)]
    inputs[2] = normal(2, 50, 16, 2, grad=True).transpose(2, 3)
    packed = [x.detach().contiguous().requires_grad_() for x in inputs]
    d_out = normal(1, 1, 1, 16).expand(2, 50, 4, 16)
    results = []
    for q, k, v in (inputs, packed):
        out = moba_attention(q, k, v, block_size=8, top_k=3, **CPU)
        results.append([out, *torch.autograd.grad(out, (q, k, v), d_out)])
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


def test_keys_without_gradient(normal):
    (q, k, v), d_out = call(normal, 40)
    out = moba_attention(q, k.detach(), v.detach(), block_size=8, top_k=2, **CPU)
    expected = torch.autograd.grad(moba_attention(q, k, v, block_size=8, top_k=2, **CPU), q, d_out)
    assert torch.equal(torch.autograd.grad(out, q, d_out)[0], expected[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_values_that_are_not_finite_stay_in_range(normal, value, where):
    """Block numbers stay block numbers, and blocks before the value are as before."""
    inputs, d_out = call(normal, 60)
    before = moba_attention(*inputs, block_size=8, top_k=3, **CPU)
    with torch.no_grad():
        inputs[where][:, 20] = value
    selected = moba_select(*inputs[:2], block_size=8, top_k=3, **CPU)
    own = torch.arange(60)[:, None, None] // 8
    assert ((selected >= -1) & (selected < own)).all()
    after = moba_attention(*inputs, block_size=8, top_k=3, **CPU)
    torch.autograd.grad(after, inputs, d_out)
    assert torch.equal(before[:, :16], after[:, :16])


def test_nan_scores_come_first_as_in_the_reference(normal):
    q, k = normal(1, 40, 2, 8), normal(1, 40, 2, 8)
    k[:, 9] = -math.nan
    selected = moba_select(q, k, block_size=4, top_k=2, **CPU)
    assert (selected[:, 12:] == 2).all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().size() // x.element_size())
        return result


def test_memory_is_linear_in_tokens(normal, monkeypatch):
    """Twice the tokens at most double the largest tensor; the scores of all blocks would quadruple."""
    monkeypatch.setattr(tiles, "PARTIALS_AT_ONCE", 2**10)
    monkeypatch.setattr(tiles, "ROWS_PER_BLOCK", 4)
    monkeypatch.setattr(selection, "SCORES_AT_ONCE", 2**10)
    monkeypatch.setattr(cpu, "BYTES_AT_ONCE", 2**12)
    largest, blocking = [], Blocking(None, None, 4, 3)
    for tokens in (1024, 2048):
        (q, k, v), d_out = call(normal, tokens, heads=2, kv_heads=1, width=8)
        with torch.no_grad(), LargestTensor() as seen:
            out, lse, selected = cpu.forward(q, k, v, None, blocking, 1.0)
            cpu.backward(d_out, None, q, k, v, out, lse, selected, blocking, 1.0)
        largest.append(seen.elements)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 2 * 2048 * 512 / 8
