"""Given blocks, the log-sum-exp, and merging by it, on every backend, against the fp64 oracle."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attending import batched, packed
from given import Given, assert_as_accurate_as_plain_pytorch, at_random
from torch import Tensor
from torch.func import grad, jvp, vmap

from openmoba import block_attention, explain, merge_attention, moba_attention, moba_select
from openmoba.ops.arguments import Blocking
from openmoba.ops.checks import own_blocks
from openmoba.ops.reference import attention_mask, attention_over

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BACKENDS = pytest.mark.parametrize("impl", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"))])  # fmt: skip


def run(given: Given, impl: str) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients of the public function."""
    case = given.case
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = block_attention(
        *inputs, given.blocks, block_size=case.block_size, cu_seqlens_q=case.cu_q, cu_seqlens_k=case.cu_k,
        return_lse=True, impl=impl,
    )  # fmt: skip
    d_lse = torch.zeros_like(lse) if given.d_lse is None else given.d_lse.to(lse.dtype)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, (case.d_out, d_lse))


@pytest.mark.parametrize(
    ("dtype", "shape", "block_size", "most", "lists"),
    [
        (FP32, (2, 150, 150, 4, 2, 16), 16, 3, 4),
        (BF16, (1, 150, 150, 4, 2, 64), 16, 3, 2),
        (FP16, (1, 20, 130, 3, 1, 13), 7, 9, 1),
        (FP32, (2, 11, 11, 2, 1, 8), 1, 40, 2),  # more than there are past blocks
        (FP32, (1, 9, 9, 2, 2, 8), 16, 3, 2),  # no past block at all
        (BF16, (1, 1, 50, 3, 1, 16), 16, 2, 3),
    ],
)
def test_against_fp64(dtype, shape, block_size, most, lists):
    given = at_random(batched(dtype, shape, block_size, 0), most, lists)
    assert_as_accurate_as_plain_pytorch(given, run(given, "cpu"))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("lists", [1, 3])
def test_packed_against_fp64(impl, lists):
    """Empty sequences, sequences with keys alone, and fewer queries than keys."""
    given = at_random(packed(FP32, [30, 1, 0, 9, 5, 0], [30, 1, 0, 31, 5, 20], (3, 1, 16), 8, 0), 3, lists)
    assert_as_accurate_as_plain_pytorch(given, run(given, impl))


def test_triton_by_the_public_function():
    given = at_random(batched(FP32, (1, 20, 27, 2, 1, 16), 8, 0), 2, 1)
    assert_as_accurate_as_plain_pytorch(given, run(given, "triton"))


@pytest.mark.parametrize("gradient", ["out", "lse"])
def test_gradients_of_the_output_alone_and_of_the_log_sum_exp_alone(gradient):
    """Where nothing but the log-sum-exp is differentiated, and where its gradient is far larger than the output's."""
    case = batched(BF16, (1, 100, 100, 4, 2, 32), 16, 0)
    given = at_random(case, 3, 2)
    if gradient == "out":
        given = replace(given, d_lse=None)
        assert_as_accurate_as_plain_pytorch(given, run(given, "cpu"))
        return
    given = replace(given, case=replace(case, d_out=torch.zeros_like(case.d_out)), d_lse=1000 * given.d_lse)
    assert_as_accurate_as_plain_pytorch(given, run(given, "cpu"))
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    lse = block_attention(q, k, v, given.blocks, block_size=16, return_lse=True)[1]
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), given.d_lse)
    assert all(map(torch.equal, (dq, dk, dv), run(given, "cpu")[2:]))
    assert not dv.any()


def both(call, tensors, d_out, d_lse):
    inputs = [x.detach().requires_grad_() for x in tensors]
    out, lse = call(*inputs)
    return out, lse, *torch.autograd.grad((out, lse), inputs, (d_out, d_lse.to(lse.dtype)))


@BACKENDS
@pytest.mark.parametrize("top_k", [1, 3])
def test_mobas_choice_given_is_moba(impl, top_k):
    """Bit for bit."""
    case = batched(FP32, (1, 20, 27, 2, 1, 16), 8, top_k)
    tensors, d_lse = (case.q, case.k, case.v), torch.ones(1, 20, 2)
    chosen = moba_select(case.q, case.k, block_size=8, top_k=top_k, impl=impl)
    settings = {"block_size": 8, "return_lse": True, "impl": impl}
    given = both(lambda *x: block_attention(*x, chosen, **settings), tensors, case.d_out, d_lse)
    moba = both(lambda *x: moba_attention(*x, top_k=top_k, **settings), tensors, case.d_out, d_lse)
    assert all(map(torch.equal, given, moba))


@BACKENDS
def test_order_repeats_none_and_lists_per_group_change_nothing(impl):
    given = at_random(batched(FP32, (1, 9, 25, 4, 2, 16), 8, 0), 3, 2)
    expected, none = run(given, impl), torch.full_like(given.blocks, -1)
    once = torch.cat([given.blocks, none, given.blocks.flip(-1)], -1)
    for blocks in (once, once.repeat_interleave(2, -2)):
        assert all(map(torch.equal, run(replace(given, blocks=blocks), impl), expected))
    for x, y in zip(run(replace(given, blocks=given.blocks.flip(-1)), impl), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_strided_blocks(impl):
    given = at_random(batched(FP32, (2, 5, 20, 4, 2, 16), 8, 0), 3, 4)
    blocks = given.blocks.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    assert all(map(torch.equal, run(replace(given, blocks=blocks), impl), run(given, impl)))


def test_own_blocks_of_packed_sequences():
    case = packed(FP32, [3, 0, 1, 5, 0], [5, 0, 9, 5, 7], (1, 1, 8), 2, 1)
    expected = [position // 2 for tokens, keys in ((3, 5), (1, 9), (5, 5)) for position in range(keys - tokens, keys)]
    assert own_blocks(case.q, case.k, Blocking(case.cu_q, case.cu_k, 2, 1)).tolist() == expected


def call(**changes):
    case = batched(FP32, (1, 9, 9, 4, 2, 8), 4, 1)
    return {
        "q": case.q,
        "k": case.k,
        "v": case.v,
        "blocks": torch.full((1, 9, 4, 1), -1).int(),
        "block_size": 4,
    } | changes


def packed_call(**changes):
    cu = torch.tensor([0, 9], dtype=torch.int32)
    one = {name: x[0] if isinstance(x, Tensor) else x for name, x in call().items()}
    return one | {"cu_seqlens_q": cu, "cu_seqlens_k": cu} | changes


def naming(block: int, token: int) -> Tensor:
    blocks = call()["blocks"].clone()
    blocks[0, token, 2, 0] = block
    return blocks


BAD = {
    "blocks[0, 5, 2, 0] is 1, and the query's own block is 1, which it reads anyway; its past blocks are 0 to 0, and "
    "-1 stands for none": lambda: call(blocks=naming(1, 5)),
    "blocks[0, 8, 2, 0] is 7, and the query's own block is 2": lambda: call(blocks=naming(7, 8)),
    "blocks[0, 8, 2, 0] is -2, and": lambda: call(blocks=naming(-2, 8)),
    "which it reads anyway; it has no past block, and -1 stands for none": lambda: call(blocks=naming(0, 3)),
}  # fmt: skip
ILL_FORMED = {
    "blocks must be a torch.Tensor, got list": lambda: call(blocks=[0]),
    "blocks must be int32, got torch.int64; use .int()": lambda: call(blocks=call()["blocks"].long()),
    "blocks is a sparse or nested tensor (torch.sparse_coo); fill it up with -1": lambda: call(
        blocks=call()["blocks"].to_sparse()
    ),
    "blocks is on meta but q is on cpu; move it there": lambda: call(blocks=call()["blocks"].to("meta")),
    "blocks must be [1, 9] and then 4 or 2 heads and any number of blocks, got [1, 9, 3, 1]": lambda: call(
        blocks=call()["blocks"][:, :, :3]
    ),
    "got [1, 8, 4, 1]; a list per query head of q, or one per head of k": lambda: call(blocks=call()["blocks"][:, :8]),
    "q must be [batch, tokens, heads, dim] or packed": lambda: call(q=call()["q"][0, 0]),
    "block_size must be >= 1, got 0": lambda: call(block_size=0),
    "v must have k's shape": lambda: call(v=call()["v"][:, :3]),
    "v must be a torch.Tensor, got NoneType": lambda: call(v=None),
    "q is a sparse or nested tensor (torch.sparse_coo)": lambda: call(q=call()["q"].to_sparse()),
    "cu_seqlens_q must be a torch.Tensor, got list": lambda: packed_call(cu_seqlens_q=[0, 9]),
}


@BACKENDS
@pytest.mark.parametrize("message", BAD)
def test_what_is_no_past_block_is_refused(impl, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        block_attention(**BAD[message](), impl=impl)


@pytest.mark.parametrize("message", ILL_FORMED)
def test_ill_formed_calls_are_refused(message):
    for function in (block_attention, explain):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(**ILL_FORMED[message]())


def test_no_list_at_all_is_refused():
    with pytest.raises(ValueError, match=r"blocks must be a torch.Tensor, got NoneType; moba_attention chooses"):
        block_attention(**call(blocks=None))


@pytest.mark.parametrize("scale", [1e-300, 10**400, True, "1"])
def test_a_scale_that_is_none_in_single_precision_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be an int or float, positive and finite"):
        block_attention(**call(scale=scale))


def test_the_reference_makes_no_longer_lists_than_there_are_blocks():
    inputs = {name: call()[name] for name in ("q", "k", "v")}
    out = moba_attention(**inputs, block_size=4, top_k=2**31 - 1, impl="reference")
    torch.testing.assert_close(out, moba_attention(**inputs, block_size=4, top_k=3, impl="reference"))


def test_what_is_no_past_block_is_refused_in_packed_and_in_compiled_calls():
    case = packed(FP32, [3, 9], [3, 9], (2, 1, 8), 4, 1)
    blocks = torch.full((12, 1, 2), -1, dtype=torch.int32)
    blocks[6, 0, 1] = 1  # the fourth token of the second sequence
    cu = {"cu_seqlens_q": case.cu_q, "cu_seqlens_k": case.cu_k}
    torch.compiler.reset()
    compiled = torch.compile(block_attention, fullgraph=True, backend="aot_eager")
    for function in (block_attention, compiled):
        with pytest.raises(ValueError, match=re.escape("blocks[6, 0, 1] is 1, and the query's own block is 0")):
            function(case.q, case.k, case.v, blocks, block_size=4, **cu)
    with pytest.raises(RuntimeError, match="blocks must name past blocks"):
        torch.compile(block_attention, backend="aot_eager")(**call(blocks=naming(7, 8)), impl="reference")


def test_explain_knows_of_given_blocks_and_of_the_log_sum_exp():
    reason = "cpu tensors; each query reads at most 2 blocks of 4 keys"
    assert explain(**call()).reason == reason
    assert explain(**call(), impl="reference").path == "mask"
    q, k, v, _, block_size = call().values()
    explained = explain(q, k, v, block_size=block_size, top_k=3, return_lse=True)
    assert explained.path == "blocks"
    assert "top_k=3 covers all blocks: one block of 9 keys, with a log-sum-exp" in explained.reason
    for arguments in (call() | {"top_k": 2}, {"q": q, "k": k, "v": v, "block_size": 4}):
        with pytest.raises(ValueError, match="one of them"):
            explain(**arguments)


@pytest.mark.parametrize("queries", [30, 7])
@pytest.mark.parametrize("top_k", [2, 4], ids=["blocks", "dense"])
def test_the_log_sum_exp_of_moba(top_k, queries):
    """Also where dense attention would do, which has none."""
    case = batched(FP32, (2, queries, 30, 4, 2, 16), 8, top_k)
    settings = {"block_size": 8, "top_k": top_k, "return_lse": True}
    tensors, d_lse = (case.q, case.k, case.v), torch.randn(2, queries, 4)
    fast = both(lambda *x: moba_attention(*x, **settings), tensors, case.d_out, d_lse)
    exact = both(lambda *x: moba_attention(*x, **settings, impl="reference"), [x.double() for x in tensors],
                 case.d_out.double(), d_lse)  # fmt: skip
    assert fast[1].dtype == FP32
    assert exact[1].dtype == FP64
    for x, y in zip(fast, exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_queries(impl):
    inputs = [torch.randn(1, tokens, 2, 8, requires_grad=True) for tokens in (0, 5, 5)]
    blocks = torch.empty(1, 0, 2, 3, dtype=torch.int32)
    out, lse = block_attention(*inputs, blocks, block_size=4, return_lse=True, impl=impl)
    assert (out.shape, lse.shape, lse.dtype) == ((1, 0, 2, 8), (1, 0, 2), FP32)
    assert [x.abs().sum() for x in torch.autograd.grad((out.sum(), lse.sum()), inputs)] == [0, 0, 0]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_under_autocast(impl):
    given = at_random(batched(FP32, (1, 30, 30, 4, 2, 16), 8, 0), 2, 2)
    case = given.case
    low = [x.bfloat16() for x in (case.q, case.k, case.v)]
    expected = block_attention(*low, given.blocks, block_size=8, return_lse=True, impl=impl)
    with torch.autocast("cpu", dtype=BF16):
        actual = block_attention(case.q, case.k, case.v, given.blocks, block_size=8, return_lse=True, impl=impl)
    assert all(map(torch.equal, actual, expected))
    assert [x.dtype for x in actual] == [BF16, FP32]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode asks for it
def test_derivatives_are_once_and_backward():
    q, k, v, blocks, block_size = call().values()

    def loss(q: Tensor, impl: str = "cpu") -> Tensor:
        out, lse = block_attention(q, k, v, blocks, block_size=block_size, return_lse=True, impl=impl)
        return (out.sum(-1) * lse).sum()

    twice = torch.stack([q, 2 * q])
    expected = torch.stack([grad(lambda q: loss(q, "reference"))(x) for x in twice])
    torch.testing.assert_close(vmap(grad(loss))(twice), expected)
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(twice), expected)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        jvp(loss, (q,), (q,))
    q = q.clone().requires_grad_()
    batch = torch.autograd.grad(loss(q).expand(2), q, torch.ones(2, 2), is_grads_batched=True)[0]
    torch.testing.assert_close(batch[1], 2 * expected[0])
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(loss(q), q, create_graph=True)[0].sum().backward()


def sources(queries: int, keys: int) -> list[Tensor]:
    """Masks `[1, 1, T, S]` that share no key; the last query has one source, the first none."""
    masks = torch.zeros(3, 1, 1, queries, keys, dtype=torch.bool)
    for mask, (start, end) in zip(masks, pairwise((0, 3, 4, keys)), strict=True):
        mask[..., start:end] = True
    masks[..., 0, :] = False
    masks[1:, ..., -1, :] = False
    return list(masks)


def test_merged_sources_are_the_whole():
    """With gradients, and once more differentiated."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, t, 4, 8, generator=generator, dtype=FP64) for t in (5, 11, 11, 5))
    k, v = k[:, :, ::2], v[:, :, ::2]
    masks = sources(5, 11)

    def merged(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(*zip(*(attention_over(*qkv, mask, 0.3) for mask in masks), strict=True))

    def whole(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return attention_over(*qkv, torch.stack(masks).any(0), 0.3)

    results = []
    for attend in (merged, whole):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*inputs)
        first = torch.autograd.grad((out * d_out).sum() + lse[:, 1:].square().sum(), inputs, create_graph=True)
        results.append((out, lse, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
    out, lse = results[0][:2]
    assert not out[:, 0].any()
    assert (lse[:, 0] == -math.inf).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_own_block_merged_with_past_blocks_from_elsewhere_is_moba(impl):
    """As where past blocks lie on other devices: gradients reach both sources through their log-sum-exps."""
    case = batched(FP32, (1, 40, 40, 4, 2, 16), 8, 3)
    chosen = moba_select(case.q, case.k, block_size=8, top_k=3)
    own = attention_mask(chosen[..., :0], 40, 8)
    past = attention_mask(chosen, 40, 8) & ~own

    def in_two(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        here = block_attention(q, k, v, chosen[..., :0], block_size=8, return_lse=True, impl=impl)
        return merge_attention(*zip(here, attention_over(q, k, v, past, 0.25), strict=True))

    tensors, d_lse = (case.q, case.k, case.v), torch.ones(1, 40, 4)
    whole = both(lambda *x: moba_attention(*x, block_size=8, top_k=3, return_lse=True), tensors, case.d_out, d_lse)
    for x, y in zip(both(in_two, tensors, case.d_out, d_lse), whole, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged_is_refused():
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    for outs, lses, message in (
        ([], [], "at least one, got 0 and 0"),
        ([out, out], [lse], "as many lses as outs, at least one, got 2 and 1"),
        ([out], [lse.half()], "lses must be float32 or float64, got torch.float16"),
        ([out, out.half()], [lse, lse], "outs[1] is torch.float16 (2, 3, 8) but outs[0] torch.float32 (2, 3, 8)"),
        ([out, None], [lse, lse], "outs[1] must be a torch.Tensor, got NoneType"),
        (out.int()[None], lse[None], "outs must be float64, float32, float16 or bfloat16, got torch.int32"),
        ([out, out.to("meta")], [lse, lse], "outs[1] is on meta but outs[0] on cpu; move it there"),
        (None, lse[None], "outs[0] must be a torch.Tensor, got NoneType"),
        ([out, out], [lse, lse[:1]], "lses[1] must be torch.float32 (2, 3), the outputs' shape without the last"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            merge_attention(outs, lses)


def test_a_source_without_a_key_has_no_weight_even_where_its_output_is_nan():
    """As a plain softmax over no key is."""
    out, lse = torch.randn(2, 3, 8), torch.zeros(2, 3)
    nan = torch.full_like(out, float("nan")).requires_grad_()
    merged, _ = merge_attention([out, nan], [lse, lse - float("inf")])
    torch.testing.assert_close(merged, out)
    assert torch.autograd.grad(merged.sum(), nan)[0].count_nonzero() == 0


def test_outputs_in_double_precision_are_merged_in_it():
    first, second = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    lse = torch.zeros(2, 3)
    merged, _ = merge_attention(iter([first, second]), iter([lse, lse]))
    torch.testing.assert_close(merged, (first + second) / 2, rtol=1e-14, atol=1e-14)
