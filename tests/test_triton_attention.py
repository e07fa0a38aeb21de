"""Plan, forward and backward in Triton's interpreter, against the fp64 oracle. bf16 runs in tests/gpu only."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from attending import INTERPRETED, Case, assert_as_accurate_as_plain_pytorch, batched, opposed, oracle, packed, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
import triton.language as tl

from openmoba import moba_attention
from openmoba.ops.arguments import Blocking
from openmoba.ops.triton import attend, attention, gradients
from openmoba.ops.triton import plan as plans
from openmoba.ops.triton.family import pairs_per_item
from openmoba.ops.triton.geometry import Geometry, Heads
from openmoba.ops.triton.host.launch import Launch
from openmoba.ops.triton.plan import item_bounds, make_items, make_plan
from openmoba.ops.triton.portable import tuning

pytestmark = INTERPRETED

FP16, FP32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _no_launches_of_other_tests() -> None:
    """A test that changes tiles must not find launches with others."""
    attend._launches.cache_clear()
    gradients._launches.cache_clear()
    plans._ordering.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "shape", "block_size", "top_k"),
    [
        (FP32, (1, 53, 53, 4, 2, 16), 16, 2),
        (FP16, (2, 50, 50, 2, 1, 64), 16, 3),
        (FP32, (2, 21, 50, 3, 1, 24), 13, 3),
        (FP16, (1, 37, 50, 5, 1, 24), 13, 3),
        (FP32, (1, 40, 40, 5, 1, 8), 16, 1),
        (FP16, (2, 33, 40, 3, 3, 8), 16, 1),
        (FP32, (1, 150, 270, 1, 1, 80), 130, 2),
        (FP16, (1, 270, 270, 1, 1, 80), 130, 2),
        (FP32, (1, 25, 45, 2, 1, 96), 7, 4),
        (FP16, (1, 45, 45, 2, 2, 96), 7, 4),
        (FP32, (1, 70, 70, 1, 1, 256), 32, 2),
        (FP16, (1, 110, 110, 1, 1, 192), 50, 2),
        (FP32, (1, 11, 11, 2, 1, 8), 1, 4),
        (FP16, (1, 5, 50, 1, 1, 16), 2, 21),
        (FP16, (1, 1, 50, 3, 1, 16), 16, 2),
    ],
)
@pytest.mark.usefixtures("planning")
def test_batched(dtype, shape, block_size, top_k):
    assert_as_accurate_as_plain_pytorch(batched(dtype, shape, block_size, top_k))


def test_logits_far_below_zero():
    """The keys that a tile has beyond its block have logits of 0, which is then far above all others."""
    case = opposed(batched(FP16, (1, 40, 40, 2, 1, 16), 12, 2), 10.0)
    assert_as_accurate_as_plain_pytorch(case)


@pytest.mark.parametrize(
    ("dtype", "lengths_q", "lengths_k", "block_size", "top_k"),
    [
        (FP32, [35, 1, 0, 20, 5, 0], [35, 1, 0, 41, 5, 20], 8, 3),
        (FP16, [0, 35, 1, 13], [0, 35, 30, 13], 16, 6),
        (FP16, [0, 3, 17, 16], [1, 3, 17, 16], 16, 1),
    ],
)
@pytest.mark.usefixtures("planning")
def test_packed(dtype, lengths_q, lengths_k, block_size, top_k):
    """Sequences of no and of one token, and keys without queries, whose gradient is zero."""
    assert_as_accurate_as_plain_pytorch(packed(dtype, lengths_q, lengths_k, (3, 1, 16), block_size, top_k))


@pytest.mark.parametrize("block_size", [16, 130])
def test_one_block_chosen_by_all(block_size):
    case = batched(FP16, (1, 16, 3 * block_size, 2, 1, 16), block_size, 2)
    case.k[:, block_size : 2 * block_size, :, 0] += 3
    case.q[..., 0] = 4
    assert case.select().unique().tolist() == [1]
    assert_as_accurate_as_plain_pytorch(case)


def test_one_token_returns_its_value():
    case = packed(FP32, [1, 1], [1, 1], (2, 1, 8), 16, 2)
    out, dq, dk, dv = run(case)
    assert torch.equal(out, case.v.expand_as(out))
    torch.testing.assert_close(dv, case.d_out.sum(1, keepdim=True))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-6


@pytest.mark.parametrize("sharpness", [30, 0.0])
def test_saturated_and_uniform_softmax(sharpness):
    case = batched(FP32, (1, 40, 40, 2, 1, 16), 8, 3)
    case = replace(case, q=case.q * sharpness)
    for x, exact in zip(run(case), oracle(case, case.select()), strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_scale():
    case = batched(FP32, (1, 40, 40, 2, 1, 16), 8, 3)
    settings = {"block_size": 8, "top_k": 3, "impl": "triton"}
    doubled = moba_attention(case.q, case.k, case.v, scale=0.5, **settings)
    assert torch.equal(doubled, moba_attention(2 * case.q, case.k, case.v, **settings))


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_log_sum_exp(layout):
    """The natural logarithm of the sum over the keys that the row reads: with one block, those up to the query."""
    case = batched(FP32, (2, 20, 27, 2, 1, 16), 16, 1)
    if layout == "packed":
        case = packed(FP32, [20, 4, 13], [20, 11, 13], (2, 1, 16), 16, 1)
    lse = attention.forward(case.q, case.k, case.v, None, Blocking(case.cu_q, case.cu_k, 16, 1), 0.25)[1]
    # With zero keys, every key adds exp(0).
    zero = attention.forward(case.q, 0 * case.k, case.v, None, Blocking(case.cu_q, case.cu_k, 16, 1), 0.25)[1]
    positions = torch.arange(7, 27)
    if layout == "packed":
        positions = torch.cat([torch.arange(20), torch.arange(7, 11), torch.arange(13)])
    expected = (positions % 16 + 1).float().log()[:, None].expand(-1, 2)
    torch.testing.assert_close(zero, expected.expand_as(zero))
    assert lse.dtype == FP32
    assert not torch.allclose(lse, zero)


def test_strided_inputs(randn):
    q, d_out = (randn(2, 2, 20, 48, dtype=FP32).transpose(1, 2)[..., 8:24] for _ in range(2))
    k, v = (randn(2, 20, 2, 80, dtype=FP32)[..., 48:64] for _ in range(2))
    strided = Case(q, k, v, d_out, 8, 3)
    contiguous = Case(q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous(), 8, 3)
    for x, y in zip(run(strided), run(contiguous), strict=True):
        assert torch.equal(x, y)


def test_expanded_output_gradient():
    case = batched(FP32, (1, 30, 30, 2, 1, 16), 8, 2)
    one = torch.ones(()).expand_as(case.q)
    for x, y in zip(run(replace(case, d_out=one)), run(replace(case, d_out=one.contiguous())), strict=True):
        assert torch.equal(x, y)


def test_bits_repeat_and_do_not_depend_on_the_workspace(monkeypatch):
    case = batched(FP32, (2, 9, 20, 3, 3, 16), 8, 2)
    chunks: list[int] = []
    heads_at_once = attention.heads_at_once

    def counted(*args):
        chunks.append(heads_at_once(*args))
        return chunks[-1]

    monkeypatch.setattr(attention, "heads_at_once", counted)
    first, again = run(case), run(case)
    pairs, items = 2 * 9, 2 * 3 + 1
    head_bytes = pairs * (16 * 4 + 24), pairs * (16 * 4 + 24) + 2 * items * 8 * 16 * 4
    monkeypatch.setattr(attention, "workspaces", lambda _: tuple(2 * x for x in head_bytes))
    for x, y, z in zip(first, again, run(case), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    assert chunks == [3, 3, 3, 3, 2, 2]


@pytest.mark.parametrize("ranges", [2, 3, 13])
@pytest.mark.parametrize(
    "case",
    [
        batched(FP32, (1, 40, 40, 2, 1, 16), 8, 3),
        batched(FP16, (2, 33, 50, 6, 2, 16), 13, 3),
        batched(FP32, (1, 26, 300, 1, 1, 8), 130, 2),
        packed(FP32, [35, 1, 0, 20, 5, 0], [35, 1, 0, 41, 5, 20], (3, 1, 16), 8, 3),
        packed(FP16, [0, 35, 1, 13], [0, 35, 30, 13], (4, 2, 16), 16, 6),
    ],
)
def test_ranges_of_queries_do_not_change_the_bits(monkeypatch, case, ranges):
    # The interpreter's matrix product rounds by where a row stands in its tile; einsum does not.
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype=None: numpy.einsum("ij,jk->ik", a, b, dtype=dtype))
    call = (case.q, case.k, case.v, None, Blocking(case.cu_q, case.cu_k, case.block_size, case.top_k), 0.25)
    geometry = Geometry.of(case.q, case.k, case.cu_q, case.block_size, case.top_k)
    whole = attention.forward(*call)[:2]
    pairs = geometry.rows * (case.top_k - 1)
    bytes_of_a_range = pairs * (geometry.width * case.q.dtype.itemsize + 24) // ranges + 1
    monkeypatch.setattr(attention, "workspaces", lambda _: (bytes_of_a_range, bytes_of_a_range))
    tokens = attention.tokens_at_once(geometry, 1, case.q.dtype, case.q.device)
    assert tokens == -(-geometry.query_tokens // ranges)
    for x, y in zip(whole, attention.forward(*call)[:2], strict=True):
        assert torch.equal(x, y)


def test_own_slots_are_those_of_the_tokens():
    geometry = Geometry(False, 3, 7, 10, Heads(1, 1, 8), 4, 2)  # queries at 3 to 9 in the blocks 0, 1, 1, 1, 1, 2, 2
    slots = [sequence * 3 + block for sequence in range(3) for block in (0, 1, 1, 1, 1, 2, 2)]
    for first, end in ((0, 21), (0, 1), (1, 2), (5, 9), (20, 21)):
        assert geometry.own_block_slots(range(first, end)) == range(slots[first], slots[end - 1] + 1)
    assert replace(geometry, packed=True).own_block_slots(range(3, 5)) == range(geometry.tokens_k // 4 + 3)


@pytest.mark.parametrize("block_size", [100, 512, 4096, 8192])
def test_partials_of_key_gradients_take_less_than_shares_of_query_gradients(block_size):
    """At a million tokens they do not decide what fits in memory."""
    geometry = Geometry(False, 1, 2**20, 2**20, Heads(32, 8, 128), block_size, 8)
    pairs = geometry.rows * 7
    items = pairs // pairs_per_item(geometry) + geometry.block_slots
    shares = max(1, gradients.dq_pieces(geometry, FP16))
    assert 2 * items * block_size * 128 * 4 < pairs * shares * 128 * 2


def test_more_pairs_than_int32_counts_are_refused():
    q, k = torch.empty(1, 1, 32, 8).expand(1, 2**24, 32, 8), torch.empty(1, 1, 1, 8).expand(1, 2**24, 1, 8)
    with pytest.raises(ValueError, match="make 3758096384 pairs of query and block"):
        attention.forward(q, k, k, None, Blocking(None, None, 128, 8), 1.0)


@pytest.mark.parametrize(
    ("tokens", "block_size", "top_k", "heads", "tokens_at_once"),
    [
        (2**15, 512, 3, 4, 2**15),  # four shares of dQ per pair: the backward decides
        (2**15, 128, 8, 3, 2**15),  # the forward decides
        (2**17, 512, 3, 1, 2**17),
        (2**17, 128, 8, 1, 2**16),  # a head of the backward is 1.03 GB
    ],
)
def test_heads_at_once_on_a_large_device(monkeypatch, tokens, block_size, top_k, heads, tokens_at_once):
    device = torch.device("cuda")
    monkeypatch.setattr(attention, "memory_bytes", lambda _: 80 * 2**30)
    geometry = Geometry(False, 1, tokens, tokens, Heads(32, 8, 128), block_size, top_k)
    assert attention.heads_at_once(geometry, FP16, device) == heads
    assert attention.tokens_at_once(geometry, heads, FP16, device) == tokens_at_once


def test_the_workspace_holds_the_partials_of_keys_and_values(monkeypatch):
    """Many short sequences: every list has a whole block of partials, and hardly a pair."""
    monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", "1")
    case = packed(FP32, [2] * 39 + [70], [2] * 39 + [70], (4, 4, 16), 64, 2)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(Launch, "__call__", lambda *_: None)  # allocations are all that counts
    blocking = Blocking(case.cu_q, case.cu_k, 64, 2)
    saved = attention.forward(case.q, case.k, case.v, None, blocking, 0.25)
    with Watch():
        attention.backward(case.d_out, None, case.q, case.k, case.v, *saved, blocking, 0.25)
    geometry = Geometry.of(case.q, case.k, case.cu_q, 64, 2)
    of_a_head = gradients.key_partial_bytes(geometry)
    assert 4 * of_a_head > 2**20 >= largest >= of_a_head


def test_workspace_setting(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", "3")
    assert attention.workspaces(device) == (3 * 2**20, 3 * 2**20)
    for wrong in ("0", "-1", "1.5", "many", ""):
        monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", wrong)
        with pytest.raises(ValueError, match="OPENMOBA_WORKSPACE_MB must be a whole number"):
            attention.workspaces(device)


@pytest.mark.parametrize("block_size", [8, 150])
def test_long_lists_are_cut(monkeypatch, block_size):
    """Lists of several items: partial sums of dK and dV are added up, and no pair is lost between items."""
    for step in ("attend_past", "key_gradients"):
        whole = getattr(tuning, step)
        monkeypatch.setattr(tuning, step, lambda *args, whole=whole: replace(whole(*args), m=16, segment=16))
    assert_as_accurate_as_plain_pytorch(batched(FP32, (1, 45, 2 * block_size + 30, 2, 1, 16), block_size, 2))


def test_no_tokens():
    case = packed(FP32, [0, 0], [0, 20], (2, 1, 16), 8, 2)
    out, dq, dk, dv = run(case)
    assert out.shape == dq.shape == (0, 2, 16)
    assert not dk.any()
    assert not dv.any()


@triton.jit
def _bounds_of_items(items_ptr, offsets_ptr, out_ptr, block_slots, segment):
    program = tl.program_id(0)
    item, list_id, begin, end = item_bounds(items_ptr, offsets_ptr, program, block_slots, segment)
    tl.store(out_ptr + program * 4, item)
    tl.store(out_ptr + program * 4 + 1, list_id)
    tl.store(out_ptr + program * 4 + 2, begin)
    tl.store(out_ptr + program * 4 + 3, end)


@pytest.mark.parametrize("absent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("heads", "block_slots", "rows"), [(1, 2, 5), (3, 10, 40), (2, 40, 33)])
@pytest.mark.parametrize("segment", [1, 8, 1024])
@pytest.mark.parametrize("sorted_lists", [4, 256])
@pytest.mark.usefixtures("planning")
def test_plan(monkeypatch, absent, heads, block_slots, rows, segment, sorted_lists):
    """Every present pair lies in exactly one item, of the list that its key names, in ascending order.

    Items of the last lists come longest first.
    """
    monkeypatch.setattr(plans, "_SORTED", sorted_lists)
    generator = torch.Generator().manual_seed(0)
    none = heads * block_slots
    past_blocks = (torch.arange(rows) + 4 * block_slots - rows) // 4  # the queries are the last tokens
    random = torch.rand(2, heads, rows, 2, generator=generator)
    keys = (random[0] * past_blocks[:, None]).int() + torch.arange(heads)[:, None, None] * block_slots
    keys[(random[1] < absent) | (past_blocks == 0)[:, None]] = none
    geometry = Geometry(False, 1, rows, block_slots * 4, Heads(heads, heads, 8), 4, 3)
    pairs, offsets = (torch.empty(n, dtype=torch.int32) for n in (keys.numel(), heads * (block_slots + 1)))
    plan = make_plan(keys.short(), pairs, offsets.view(heads, -1), geometry)

    expected = [(keys.flatten() == list_id).nonzero().flatten() for list_id in range(none)]
    lengths = [len(x) for x in expected]
    offsets = plan.offsets.view(heads, -1).long()
    assert torch.equal(offsets.diff().flatten(), torch.tensor(lengths))
    starts = offsets[:, :-1].flatten().tolist()
    for list_id, start in enumerate(starts):
        assert torch.equal(plan.pairs[start : start + lengths[list_id]].long(), expected[list_id])

    items = make_items(plan, geometry, segment)
    bounds = torch.empty((len(items), 4), dtype=torch.int32)
    _bounds_of_items[(len(items),)](items, plan.offsets, bounds, block_slots, segment)
    found = [bound for bound in bounds.tolist() if bound[2] < bound[3]]
    wanted = [
        [start // segment + list_id + part, list_id, start + begin, start + min(begin + segment, length)]
        for list_id, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for part, begin in enumerate(range(0, length, segment))
    ]

    def order(bound: list[int]) -> int:
        _, list_id, begin, end = bound
        return begin - end if list_id >= none - sorted_lists else -segment - 1

    assert found == sorted(wanted, key=order)
    assert len({bound[0] for bound in found}) == len(found)
