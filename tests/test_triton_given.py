"""Given blocks in Triton's interpreter, against the fp64 oracle. bf16 and Hopper's kernels run in tests/gpu only."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from attending import INTERPRETED, assert_same_bits, batched, packed
from attending import run as run_moba
from given import Given, assert_as_accurate_as_plain_pytorch, at_random, of_moba, on_lists_per_head, run

pytest.importorskip("triton")

from openmoba.ops.triton import attention, route
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.host import replay
from openmoba.ops.triton.host.launch import Launch

pytestmark = INTERPRETED

FP16, FP32 = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "shape", "block_size", "most", "lists"),
    [
        (FP32, (1, 21, 21, 4, 2, 16), 8, 1, 4),
        (FP16, (2, 20, 50, 2, 1, 64), 16, 2, 1),
        (FP32, (2, 9, 40, 3, 1, 24), 13, 9, 3),  # more than there are past blocks
        (FP32, (1, 10, 150, 1, 1, 80), 65, 3, 1),  # a pair has several shares of dQ
        (FP32, (1, 40, 40, 2, 1, 8), 1, 50, 2),  # fewer rows, and chance decides whose rounding is better
        (FP32, (1, 9, 9, 2, 1, 8), 16, 3, 1),  # no past block at all
        (FP16, (1, 1, 50, 3, 1, 16), 16, 2, 3),
        (FP32, (2, 40, 60, 2, 1, 16), 2**31 - 1, 2, 1),  # the largest block there is
    ],
)
def test_batched(dtype, shape, block_size, most, lists):
    assert_as_accurate_as_plain_pytorch(at_random(batched(dtype, shape, block_size, 0), most, lists))


@pytest.mark.parametrize(
    ("dtype", "lengths_q", "lengths_k", "block_size", "most", "lists"),
    [
        (FP32, [12, 1, 0, 5, 3, 0], [12, 1, 0, 21, 3, 10], 4, 3, 2),
        (FP16, [0, 9, 1, 5], [0, 25, 20, 5], 8, 6, 1),
        (FP32, [0, 40, 1, 25], [0, 60, 20, 25], 2**31 - 1, 3, 1),
    ],
)
@pytest.mark.usefixtures("planning")
def test_packed(dtype, lengths_q, lengths_k, block_size, most, lists):
    case = packed(dtype, lengths_q, lengths_k, (2, 1, 16), block_size, 0)
    assert_as_accurate_as_plain_pytorch(at_random(case, most, lists))


@pytest.mark.parametrize("gradient", ["out", "lse"])
def test_gradients_of_the_output_alone_and_of_the_log_sum_exp_alone(gradient):
    given = at_random(batched(FP32, (1, 9, 25, 2, 1, 16), 8, 0), 3, 2)
    if gradient == "out":
        given = replace(given, d_lse=None)
    else:
        given = replace(given, case=replace(given.case, d_out=torch.zeros_like(given.case.d_out)))
    assert_as_accurate_as_plain_pytorch(given)


@pytest.mark.parametrize("block_size", [8, 65])
def test_mobas_own_choice_gives_mobas_bits(block_size):
    case = batched(FP32, (1, 5, 3 * block_size + 7, 2, 1, 16), block_size, 3)
    out, _, *gradients = run(of_moba(case))
    assert_same_bits((out, *gradients), run_moba(case))


def test_repeats_order_none_and_lists_per_group():
    """The same blocks said in other ways: the bits are the same where the order of first mention is."""
    given = at_random(batched(FP32, (1, 5, 20, 2, 1, 16), 8, 0), 3, 1)
    expected = run(given)
    none = torch.full_like(given.blocks, -1)
    repeats = torch.stack([none, given.blocks, given.blocks], -1).flatten(-2)
    for blocks in (repeats, torch.cat([given.blocks, none, given.blocks.flip(-1)], -1)):
        assert_same_bits(run(replace(given, blocks=blocks)), expected)
    assert_same_bits(run(on_lists_per_head(given)), expected)
    for x, y in zip(run(replace(given, blocks=given.blocks.flip(-1))), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("most", [0, 3])
def test_no_blocks_is_the_own_block_alone(most):
    case = batched(FP32, (1, 9, 25, 2, 1, 16), 8, 1)
    blocks = torch.full((1, 9, 1, most), -1, dtype=torch.int32)
    out, _, *gradients = run(Given(case, blocks))
    assert_same_bits((out, *gradients), run_moba(case))


def test_what_is_no_past_block_is_read_by_no_row():
    """What is asserted against on a GPU: until the assertion is heard, nothing is read where it should not be."""
    given = at_random(batched(FP32, (1, 9, 25, 2, 1, 16), 8, 0), 3, 1)
    wrong = torch.tensor([3, 2**30, -2, -(2**31)], dtype=torch.int32)  # the last block is the own one of the last rows
    blocks = torch.cat([wrong.expand(1, 9, 1, 4), given.blocks], -1)
    assert_same_bits(run(replace(given, blocks=blocks)), run(given))


def test_strided_blocks_and_gradients():
    given = at_random(batched(FP32, (2, 3, 20, 2, 2, 16), 8, 0), 3, 2)
    blocks = given.blocks.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    assert not blocks.is_contiguous()
    d_lse = torch.ones(()).expand(2, 3, 2)
    strided = run(replace(given, blocks=blocks, d_lse=d_lse))
    assert_same_bits(strided, run(replace(given, d_lse=d_lse.contiguous())))


def test_more_blocks_than_int16_numbers(monkeypatch):
    given = at_random(batched(FP32, (1, 9, 25, 2, 1, 16), 8, 0), 3, 2)
    expected = run(given)
    monkeypatch.setattr(route, "INT16_SORT_KEYS", 0)
    assert_same_bits(run(given), expected)


def test_heads_at_a_time_do_not_change_the_bits(monkeypatch):
    given = at_random(batched(FP32, (1, 3, 20, 3, 3, 16), 8, 0), 2, 3)
    whole = run(given)
    monkeypatch.setattr(attention, "heads_at_once", lambda *_: 2)
    assert_same_bits(run(given), whole)


@pytest.mark.parametrize(
    "case",
    [
        batched(FP16, (2, 9, 30, 1, 1, 16), 13, 0),
        packed(FP32, [9, 1, 0, 5, 0], [9, 1, 0, 21, 20], (2, 1, 16), 8, 0),
    ],
)
def test_ranges_of_queries_do_not_change_the_bits(monkeypatch, case):
    # The interpreter's matrix product rounds by where a row stands in its tile; einsum does not.
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype=None: numpy.einsum("ij,jk->ik", a, b, dtype=dtype))
    given = at_random(case, 2, case.q.shape[-2])
    whole = run(given)
    geometry = Geometry.of(case.q, case.k, case.cu_q, case.block_size, 3)
    monkeypatch.setattr(attention, "workspaces", lambda _: (attention._head_bytes(geometry, case.q.dtype, 1) // 3,) * 2)
    assert attention.tokens_at_once(geometry, 1, case.q.dtype, case.q.device) < geometry.query_tokens // 2
    assert_same_bits(run(given), whole)


def test_calls_do_nothing_but_launch_so_that_they_can_be_replayed(monkeypatch):
    given = at_random(batched(FP32, (1, 9, 25, 2, 1, 16), 8, 0), 3, 2)
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)  # the interpreter would do its own operations
    with replay._Watch() as watch:
        run(given)
    assert watch.launches_alone
