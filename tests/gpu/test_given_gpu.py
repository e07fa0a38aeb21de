"""Blocks that the caller gives, on a GPU, against the fp64 oracle; `tests/test_triton_given.py` has more of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from attending import assert_same_bits, batched, packed
from attending import run as run_moba
from given import Given, assert_as_accurate_as_plain_pytorch, at_random, of_moba, on_lists_per_head, run
from torch import Tensor

from openmoba import block_attention
from openmoba.bench.timing import replayed
from openmoba.ops.triton import attention, hopper
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.host import replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def assert_repeatable_and_as_accurate_as_plain_pytorch(given: Given) -> None:
    """Of the second run, a replay where there is one."""
    first = run(given)
    assert_as_accurate_as_plain_pytorch(given)
    assert_same_bits(first, run(given))


def example() -> Given:
    """32 query heads in 8 groups with a list each, of which a third is none or a repeat."""
    return at_random(batched(BF16, (2, 1000, 1000, 32, 8, 128), 128, 0, "cuda"), 4, 8)


@pytest.mark.parametrize(
    ("dtype", "shape", "block_size", "most", "lists"),
    [
        (BF16, (1, 301, 301, 32, 1, 64), 16, 40, 1),
        (FP16, (2, 333, 700, 2, 2, 64), 100, 3, 2),
        (BF16, (1, 650, 650, 4, 1, 80), 128, 300, 4),
        (FP16, (1, 613, 613, 4, 4, 192), 128, 2, 4),
        (FP32, (1, 200, 200, 4, 2, 64), 32, 3, 2),
    ],
)
@pytest.mark.usefixtures("planning")
def test_batched(dtype, shape, block_size, most, lists):
    given = at_random(batched(dtype, shape, block_size, 0, "cuda"), most, lists)
    assert_repeatable_and_as_accurate_as_plain_pytorch(given)


@pytest.mark.parametrize("path", ["hopper", "triton"])
@pytest.mark.parametrize(
    ("dtype", "shape", "block_size", "most", "lists"),
    [
        (BF16, (2, 1000, 1000, 8, 2, 128), 128, 3, 2),
        (FP16, (1, 777, 1700, 3, 1, 128), 256, 9, 3),
        (BF16, (1, 3000, 3000, 8, 2, 64), 512, 2, 8),
        (FP16, (1, 2100, 2100, 4, 4, 64), 128, 5, 4),
        (BF16, (1, 3333, 5000, 2, 1, 128), 1024, 3, 1),
        (FP16, (1, 5500, 5500, 2, 1, 64), 128, 50, 1),
    ],
)
def test_both_paths_on_hopper(dtype, shape, block_size, most, lists, path, monkeypatch):
    """Where Hopper's own kernels serve, so do the ones of all other GPUs."""
    case = batched(dtype, shape, block_size, 0, "cuda")
    if path == "triton":
        monkeypatch.setattr(hopper, "is_available", lambda _: False)
    elif hopper.why_not(Geometry.of(case.q, case.k, None, block_size, most + 1), case.q, case.k, case.v) is not None:
        pytest.skip("not a Hopper GPU, or a Triton without these kernels")
    assert_repeatable_and_as_accurate_as_plain_pytorch(at_random(case, most, lists))


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "heads", "block_size", "most", "lists"),
    [
        ([513, 1, 0, 200, 64, 0], [513, 1, 0, 411, 64, 100], (6, 2, 96), 100, 3, 6),
        ([700, 1, 0, 1300], [700, 1, 0, 1411], (8, 2, 128), 128, 4, 2),
    ],
)
def test_packed(lengths_q, lengths_k, heads, block_size, most, lists):
    case = packed(BF16, lengths_q, lengths_k, heads, block_size, 0, "cuda")
    assert_repeatable_and_as_accurate_as_plain_pytorch(at_random(case, most, lists))


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_mobas_own_choice_gives_mobas_bits(block_size):
    case = batched(BF16, (1, 3000, 3000, 8, 2, 64), block_size, 3, "cuda")
    out, _, *gradients = run(of_moba(case))
    assert_same_bits((out, *gradients), run_moba(case))


def test_rows_without_past_blocks_read_their_own():
    """In one tile with rows that have some: what was never written is not read."""
    given = example()
    given.blocks[:, ::2] = -1
    assert_as_accurate_as_plain_pytorch(given)


def test_lists_per_group_are_lists_per_head():
    given = example()
    assert_same_bits(run(given), run(on_lists_per_head(given)))


def test_workspace_does_not_change_the_bits(monkeypatch):
    whole = run(example())
    monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", "1")
    assert_same_bits(run(example()), whole)


def test_replay_on_other_blocks(monkeypatch):
    given = at_random(batched(BF16, (2, 700, 700, 6, 2, 64), 64, 0, "cuda"), 3, 2)
    other = replace(given, blocks=torch.where(given.blocks > 2, -1, given.blocks))
    expected = run(other)
    replay.forget()
    run(given)
    monkeypatch.setattr(attention, "given_sort_keys", None)  # would be called again
    monkeypatch.setattr(attention, "heads_gradients", None)
    assert_same_bits(run(other), expected)


def test_no_host_synchronisation(no_waiting):
    given = example()
    run(given)  # compiles
    with no_waiting():
        run(given)


def differentiated(attend: Callable[..., tuple[Tensor, Tensor]], given: Given) -> tuple[Tensor, ...]:
    """Results and gradients of the public function, or of what was made of it."""
    case = given.case
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = attend(*inputs, given.blocks, block_size=case.block_size, return_lse=True)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, (case.d_out, given.d_lse))


def test_compiled_in_one_graph():
    given = example()
    assert_same_bits(differentiated(torch.compile(block_attention, fullgraph=True), given), run(given))


def test_cuda_graph():
    """A graph captured on some blocks replays on others, in lists of other lengths."""
    given = example()
    expected = run(replace(given, blocks=given.blocks.flip(-1).clamp(max=2)))
    replay = replayed(partial(differentiated, block_attention, given))
    given.blocks.copy_(given.blocks.flip(-1).clamp(max=2))
    assert_same_bits(replay(), expected)


@pytest.mark.parametrize("wrong", [-2, 1, 2**30])
def test_a_block_that_is_not_past_is_asserted_against_on_the_device(wrong):
    """In a process of its own: after a device-side assertion, no other kernel runs."""
    program = f"""
import torch
from attending import batched
from given import at_random, run
given = at_random(batched(torch.bfloat16, (1, 300, 300, 2, 1, 64), 128, 0, "cuda"), 3, 1)
run(given)
torch.cuda.synchronize()
print("right", flush=True)
given.blocks[0, 200, 0, 1] = {wrong}
run(given)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("right")
    assert done.returncode != 0
    assert "blocks must name past blocks, or -1 for none" in done.stdout + done.stderr
