"""The attention kernels on a GPU, against the fp64 oracle given the same choice. The choice has its own tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attending import (
    Case,
    assert_as_accurate_as_plain_pytorch,
    assert_same_bits,
    batched,
    opposed,
    oracle,
    packed,
    plain,
    run,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from openmoba import explain, moba_attention
from openmoba.bench.timing import replayed
from openmoba.ops.triton import attention, hopper
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.host import replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def example(queries: int = 1000, keys: int = 1000) -> Case:
    """Two sequences, 32 / 8 heads of width 128, blocks of 128 of which 3 are read."""
    return batched(BF16, (2, queries, keys, 32, 8, 128), 128, 3, "cuda")


def example_packed(lengths: list[int]) -> Case:
    return packed(BF16, lengths, lengths, (8, 2, 64), 64, 3, "cuda")


def assert_repeatable_and_as_accurate_as_plain_pytorch(case: Case) -> None:
    """Of the second run, a replay where there is one."""
    first = run(case)
    assert_as_accurate_as_plain_pytorch(case)
    assert_same_bits(first, run(case))


@pytest.mark.parametrize(
    ("dtype", "shape", "block_size", "top_k"),
    [
        (BF16, (2, 1000, 1000, 32, 8, 128), 128, 3),
        (FP16, (1, 777, 1700, 3, 1, 128), 512, 2),
        (BF16, (1, 301, 301, 32, 1, 64), 16, 8),
        (FP16, (2, 333, 700, 2, 2, 64), 100, 3),
        (BF16, (1, 650, 650, 4, 1, 80), 128, 4),
        (FP16, (1, 613, 613, 4, 4, 192), 128, 3),
        (BF16, (1, 1301, 1301, 2, 1, 256), 512, 2),
        (BF16, (1, 130, 130, 3, 1, 256), 16, 3),
        (BF16, (1, 500, 1500, 2, 1, 64), 16, 64),
        (BF16, (1, 500, 20000, 2, 1, 128), 8192, 2),
        (FP32, (1, 200, 200, 4, 2, 64), 32, 3),
        (FP32, (1, 150, 300, 1, 1, 256), 100, 2),
    ],
)
@pytest.mark.usefixtures("planning")
def test_batched(dtype, shape, block_size, top_k):
    case = batched(dtype, shape, block_size, top_k, "cuda")
    assert_repeatable_and_as_accurate_as_plain_pytorch(case)


@pytest.mark.parametrize(
    ("dtype", "lengths_q", "lengths_k", "heads", "block_size", "top_k"),
    [
        (BF16, [513, 1, 0, 200, 64, 0], [513, 1, 0, 411, 64, 100], (6, 2, 96), 100, 3),
        (FP16, [0, 400, 1, 113], [0, 400, 300, 113], (4, 4, 64), 16, 40),
    ],
)
@pytest.mark.usefixtures("planning")
def test_packed(dtype, lengths_q, lengths_k, heads, block_size, top_k):
    case = packed(dtype, lengths_q, lengths_k, heads, block_size, top_k, "cuda")
    assert_repeatable_and_as_accurate_as_plain_pytorch(case)


HOPPER_SHAPES = [
    (BF16, (2, 1000, 1000, 8, 2, 128), 128, 3),
    (FP16, (1, 777, 1700, 3, 1, 128), 256, 3),
    (BF16, (1, 3000, 3000, 8, 2, 64), 512, 3),
    (FP16, (1, 2100, 2100, 4, 4, 64), 128, 5),
    (BF16, (1, 3333, 5000, 2, 1, 128), 1024, 2),
    (FP16, (2, 1500, 1700, 4, 2, 64), 256, 3),
    (BF16, (1, 2400, 2400, 32, 1, 64), 512, 2),
    (FP16, (1, 5500, 5500, 2, 1, 64), 128, 40),
]


@pytest.mark.parametrize("path", ["hopper", "triton"])
@pytest.mark.parametrize(("dtype", "shape", "block_size", "top_k"), HOPPER_SHAPES)
@pytest.mark.usefixtures("planning")
def test_both_paths_on_hopper(dtype, shape, block_size, top_k, path, monkeypatch):
    """Where Hopper's own kernels serve, so do the ones of all other GPUs."""
    case = batched(dtype, shape, block_size, top_k, "cuda")
    if path == "triton":
        monkeypatch.setattr(hopper, "is_available", lambda _: False)
    elif hopper.why_not(Geometry.of(case.q, case.k, None, block_size, top_k), case.q, case.k, case.v) is not None:
        pytest.skip("not a Hopper GPU, or a Triton without these kernels")
    assert_repeatable_and_as_accurate_as_plain_pytorch(case)


@pytest.mark.usefixtures("planning")
def test_packed_batch_on_hopper():
    case = packed(BF16, [700, 1, 0, 1300], [700, 1, 0, 1411], (8, 2, 128), 128, 3, "cuda")
    assert_repeatable_and_as_accurate_as_plain_pytorch(case)


def test_rows_before_the_first_are_not_read():
    """The first sequence has keys, of no whole number of tiles, and no query; NaN lies where a row before it would."""
    case = packed(BF16, [0, 900], [70, 900], (8, 2, 128), 128, 3, "cuda")

    def behind_nan(x):
        room = torch.full((len(x) + 1, *x.shape[1:]), float("nan"), dtype=x.dtype, device="cuda")
        room[1:] = x
        return room[1:]

    case = replace(case, q=behind_nan(case.q), d_out=behind_nan(case.d_out))
    assert all(x.isfinite().all() for x in run(case))


def test_one_block_alone():
    """top_k=1 reads the own block and nothing else."""
    assert_as_accurate_as_plain_pytorch(batched(BF16, (2, 500, 610, 4, 2, 64), 128, 1, "cuda"))


def test_lists_of_many_items():
    """24000 rows choose block 0, more than any kernel handles in one item."""
    case = batched(BF16, (1, 6000, 6500, 4, 1, 64), 128, 2, "cuda")
    case.k[:, :128, :, 0] += 3
    case.q[..., 0] = 8
    assert (case.select() == 0).float().mean() > 0.99
    assert_as_accurate_as_plain_pytorch(case)


@pytest.mark.parametrize(("tokens", "block_size", "top_k"), [(512, 128, 4), (300, 512, 1)])
def test_all_blocks_is_dense(tokens, block_size, top_k):
    case = batched(BF16, (2, tokens, tokens, 8, 2, 128), block_size, top_k, "cuda")
    assert explain(case.q, case.k, case.v, **case.settings).path == "dense"
    assert_as_accurate_as_plain_pytorch(case)


def test_dense_attention_is_cudnns():
    case = batched(BF16, (2, 512, 512, 8, 2, 128), 128, 4, "cuda")
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        moba_attention(case.q, case.k, case.v, **case.settings)
        torch.cuda.synchronize()
    assert any("cudnn" in event.name for event in recorded.events())


def test_strided_inputs():
    """Views of one projection whose rows are aligned to nothing."""
    case = batched(BF16, (2, 333, 333, 6, 2, 64), 64, 3, "cuda")
    rows = torch.zeros(2, 333, 10 * 64 + 1, dtype=BF16, device="cuda")
    rows[..., 1:] = torch.cat([case.q, case.k, case.v], 2).flatten(2)
    q, k, v = rows[..., 1:].unflatten(-1, (10, 64)).split([6, 2, 2], 2)
    d_out = case.d_out.transpose(1, 2).contiguous().transpose(1, 2)
    strided, contiguous = replace(case, q=q, k=k, v=v, d_out=d_out), case
    assert strided.q.stride(1) % 2
    assert torch.equal(strided.q, contiguous.q)
    assert_same_bits(run(strided), run(contiguous))


@pytest.mark.usefixtures("planning")
def test_workspace_does_not_change_the_bits(monkeypatch):
    whole = run(example())
    monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", "1")
    assert_same_bits(run(example()), whole)


def test_replay_on_other_tensors(monkeypatch):
    case = batched(BF16, (2, 700, 700, 6, 2, 64), 64, 3, "cuda")
    other = replace(case, **{name: getattr(case, name).flip(1) for name in ("q", "k", "v", "d_out")})
    expected = run(other)
    replay.forget()
    run(case)
    monkeypatch.setattr(attention, "make_plan", None)  # would be called again
    monkeypatch.setattr(attention, "heads_gradients", None)
    assert_same_bits(run(other), expected)


@pytest.mark.parametrize("case", ["batched", "packed"])
@pytest.mark.usefixtures("planning")
def test_no_host_synchronisation(case, no_waiting):
    case = example() if case == "batched" else example_packed([700, 1, 0, 300])
    run(case)  # compiles
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    with no_waiting():
        out = moba_attention(*inputs, **case.settings)
        torch.autograd.grad(out, inputs, case.d_out)


def captured(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward in one CUDA graph, which reads the case's tensors anew at each call."""
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]

    def step() -> tuple[Tensor, ...]:
        out = moba_attention(*inputs, **case.settings)
        return out.detach(), *torch.autograd.grad(out, inputs, case.d_out)

    return replayed(step)


@pytest.mark.usefixtures("planning")
def test_cuda_graph():
    """A graph captured on one choice replays on another, of other list lengths."""
    case = example()
    graph_case = example()
    replay = captured(graph_case)
    with torch.no_grad():
        graph_case.q.copy_(case.q.flip(1))
        graph_case.k.mul_(0.5)[:, :128].add_(1)
    other = replace(case, q=graph_case.q.detach().clone(), k=graph_case.k.detach().clone())
    assert not torch.equal(other.select(), case.select())
    assert_same_bits(replay(), run(other))


@pytest.mark.usefixtures("planning")
def test_cuda_graph_of_packed_sequences():
    """The boundaries are read on the device: a replay serves other lengths."""
    case = example_packed([700, 1, 0, 300])
    replay = captured(case)
    boundaries = torch.tensor([0, 100, 444, 445, 1001], dtype=torch.int32, device="cuda")
    case.cu_q.copy_(boundaries)
    case.cu_k.copy_(boundaries)
    other = replace(case, cu_q=boundaries, cu_k=boundaries)
    assert_same_bits(replay(), run(other))


@pytest.mark.usefixtures("planning")
def test_compiled_in_one_graph():
    case = example()

    @torch.compile(fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=128, top_k=3)

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    out = attend(*inputs)
    results = out.detach(), *torch.autograd.grad(out, inputs, case.d_out)
    assert_same_bits(results, run(example()))


@pytest.mark.parametrize("queries", [1000, 300])
def test_dense_path_compiled_with_changing_lengths(queries):
    """Some but not all queries of a sequence too, for which SDPA needs what compilers do not trace."""

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=512, top_k=4)

    for more in (0, 24):
        case = replace(example(queries + more, 1000 + more), block_size=512, top_k=4)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        out = attend(*inputs)
        results = out, *torch.autograd.grad(out, inputs, case.d_out)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        expected = moba_attention(*wide, block_size=512, top_k=4)
        gradients = torch.autograd.grad(expected, wide, case.d_out.double())
        for x, plainly, exact in zip(results, run(case), (expected, *gradients), strict=True):
            error, allowed = ((y - exact).square().mean().sqrt() for y in (x, plainly))
            assert error <= 2 * allowed


def test_kernels_of_others_are_not_lost_by_replay(monkeypatch):
    """A launch that is not of this package, within a call: the call is worked out every time."""
    case = batched(BF16, (2, 700, 700, 6, 2, 64), 64, 3, "cuda")
    expected = run(case)
    replay.forget()
    row_statistics, launches = attention.row_statistics, []

    def with_another_launch(*arguments: Any) -> Tensor:
        statistics = row_statistics(*arguments)
        copy = torch.empty_like(statistics)
        _copy[(triton.cdiv(copy.numel(), 1024),)](statistics, copy, copy.numel())
        launches.append(copy)
        return copy

    monkeypatch.setattr(attention, "row_statistics", with_another_launch)
    for _ in range(3):
        assert_same_bits(run(case), expected)
    assert len(launches) == 3
    replay.forget()


@triton.jit
def _copy(x_ptr, y_ptr, size):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=at < size)


def test_more_elements_than_int32_counts(monkeypatch):
    """q of 2.2e9 elements and partial results of 3.8e9: the last rows, and the first, are what they are alone."""
    tokens, rows = 540_000, 64
    monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", "16000")
    q = torch.randn(1, tokens, 32, 128, dtype=BF16, device="cuda")
    k, v = (torch.randn(1, tokens, 8, 128, dtype=BF16, device="cuda") for _ in range(2))
    case = Case(q, k, v, q, 128, 3)
    out, dq, _, _ = run(case)
    chosen = case.select()  # among fewer blocks, scores would be quantised otherwise
    for end in (tokens, 1000):
        part = slice(end - rows, end)
        sides = q[:, part, -4:], k[:, :end, -1:], v[:, :end, -1:], q[:, part, -4:]
        alone = Case(*sides, 128, 3)
        selected = chosen[:, part, -4:]
        for x, rough, exact in zip(
            (out[:, part, -4:], dq[:, part, -4:]), plain(alone, selected), oracle(alone, selected), strict=False
        ):
            error, allowed = ((y - exact).square().mean().sqrt() for y in (x.double(), rough.double()))
            assert error <= 2 * allowed


@pytest.mark.parametrize("group", [1, 17])
def test_heads_further_apart_than_int32_counts(group):
    """Heads of q, k, v and of the output's gradient 2^27 elements apart, as in [B, H, T, D] at 1M tokens."""
    case = batched(BF16, (1, 300, 300, 17, 17 // group, 64), 64, 2, "cuda")
    apart = [torch.empty(17, 2**27, dtype=BF16, device="cuda") for _ in range(4)]
    views = [
        store[: x.shape[2], : 300 * 64].view(-1, 300, 64).transpose(0, 1)[None].copy_(x)
        for store, x in zip(apart, (case.q, case.k, case.v, case.d_out), strict=True)
    ]
    assert views[0].stride(2) * 16 >= 2**31
    assert_same_bits(run(replace(case, q=views[0], k=views[1], v=views[2], d_out=views[3])), run(case))


@pytest.mark.parametrize("block_size", [100, 128])
def test_logits_far_below_zero(block_size):
    for dtype in (BF16, FP16):
        case = batched(dtype, (1, 500, 500, 4, 2, 64), block_size, 2, "cuda")
        assert_as_accurate_as_plain_pytorch(opposed(case, 30.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    expected = run(batched(BF16, (1, 300, 300, 4, 2, 64), 64, 2, "cuda"))
    case = batched(BF16, (1, 300, 300, 4, 2, 64), 64, 2, "cuda:1")
    assert_same_bits(tuple(x.cuda() for x in run(case)), tuple(x.cuda() for x in expected))


def losses(impl: str, steps: int = 20) -> list[float]:
    """Training losses of a small two-layer model in bf16 on sequences that repeat after 150 tokens."""
    torch.manual_seed(0)
    width, heads, vocabulary = 128, 2, 64
    embed = torch.nn.Embedding(vocabulary, width, device="cuda")
    layers = torch.nn.ModuleList(torch.nn.Linear(width, 4 * width, device="cuda") for _ in range(2))
    optimizer = torch.optim.AdamW([*embed.parameters(), *layers.parameters()], lr=3e-3)
    data = torch.Generator("cuda").manual_seed(1)
    record = []
    for _ in range(steps):
        ids = torch.randint(vocabulary, (8, 150), generator=data, device="cuda").repeat(1, 4)
        x = embed(ids[:, :-1])
        for layer in layers:
            q, k, v, gate = layer(torch.nn.functional.rms_norm(x, (width,))).chunk(4, -1)
            q, k, v = (y.unflatten(-1, (heads, -1)).to(BF16) for y in (q, k, v))
            out = moba_attention(q, k, v, block_size=32, top_k=4, impl=impl)
            x = x + out.flatten(2).to(x.dtype) * gate
        loss = torch.nn.functional.cross_entropy((x @ embed.weight.T / width**0.5).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.append(loss.item())
    return record


def test_training_follows_the_reference():
    kernels, reference = losses("triton"), losses("reference")
    assert reference[-1] < 0.8 * reference[0]
    for ours, theirs in zip(kernels, reference, strict=True):
        assert abs(ours - theirs) <= 0.01 * theirs, (kernels, reference)
