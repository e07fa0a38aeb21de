"""Attention over two and three processes against one, in every process: see `test_parallel.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import PATIENCE, run_checks
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import openmoba
from openmoba import parallel
from openmoba.errors import explain
from openmoba.ops.dense import dense_attention
from openmoba.ops.key_conv import key_convolution
from openmoba.parallel import Sharding, collectives, cost, keys
from openmoba.parallel import heads as by_heads
from openmoba.parallel.collectives import Exchange, arrived, started
from openmoba.parallel.cost import values_sent

# B batch, T tokens, H heads, D head width

WAYS = [*product(("heads", "keys"), ("contiguous", "head-tail"))]
Inputs = tuple[Tensor, Tensor, Tensor]
GROUPS: dict[int | str, Any] = {}


def inputs(*shape: int, heads: int = 12, kv_heads: int = 6, dtype: torch.dtype = torch.float64) -> Inputs:
    """Queries, keys, values `[*shape, H, D]`, the same in every process."""
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple(torch.randn(*shape, n, 8, generator=generator, dtype=dtype) for n in (heads, kv_heads, kv_heads))


def with_gradients(attend: Callable[..., Tensor], tensors: Inputs, weight: Tensor) -> list[Tensor]:
    """Output, then the gradients of `(out * weight).sum()`."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def compare(
    one: Callable[..., Tensor],
    many: Callable[..., Tensor],
    tensors: Inputs,
    sharding: Sharding,
    tolerance: float | None = 1e-12,
) -> None:
    """Both passes of `many` on this rank's shard against its part of those of `one`; None asks for equal bits."""
    dim = tensors[0].dim() - 3
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=tensors[0].dtype)
    expected = with_gradients(one, tensors, weight)
    local = tuple(sharding.shard(x, dim) for x in tensors)
    found = with_gradients(lambda *x: many(*x, sharding), local, sharding.shard(weight, dim))
    for name, x, y in zip(("out", "dq", "dk", "dv"), expected, found, strict=True):
        real = sharding.unshard(y, dim)
        if tolerance is None:
            assert torch.equal(real, x), name
        else:
            torch.testing.assert_close(real, x, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def moba(block_size: int = 4, top_k: int = 3) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """MoBA on one device, and over the ranks of a sharding."""

    def one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return openmoba.moba_attention(q, k, v, block_size=block_size, top_k=top_k, **options)

    def many(q: Tensor, k: Tensor, v: Tensor, sharding: Sharding) -> Tensor:
        return parallel.moba_attention(q, k, v, sharding, block_size=block_size, top_k=top_k)

    return one, many


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense_attention(q, k, v, q.shape[-1] ** -0.5)


def rows(ranks: int, way: str, layout: str) -> None:
    """Truly sparse, at lengths that the ranks do not divide, some shorter than the ranks are many."""
    for tokens, batch in ((61, 2), (48, 1), (2, 1)):
        sharding = Sharding.over(GROUPS[ranks], tokens, way=way, layout=layout)
        compare(*moba(), inputs(batch, tokens), sharding)


def full_rows(ranks: int, way: str, layout: str) -> None:
    sharding = Sharding.over(GROUPS[ranks], 41, way=way, layout=layout)
    compare(dense, parallel.full_attention, inputs(2, 41), sharding, 1e-12)
    compare(dense, parallel.full_attention, inputs(2, 41, dtype=torch.float32), sharding, 2e-5)


def packed(ranks: int, way: str, layout: str) -> None:
    """Sequences that begin in one shard and end in another, within a shard, and empty ones."""
    cu = torch.tensor([0, 17, 19, 19, 50, 61], dtype=torch.int32)
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout, cu_seqlens=cu)
    one, many = moba()
    compare(lambda *x: one(*x, cu_seqlens_q=cu, cu_seqlens_k=cu), many, inputs(61), sharding)
    whole, _ = moba(block_size=64, top_k=1)
    compare(lambda *x: whole(*x, cu_seqlens_q=cu, cu_seqlens_k=cu), parallel.full_attention, inputs(61), sharding)


def given_blocks(ranks: int, way: str, layout: str) -> None:
    """Lists of blocks that somebody gives, per query head and per key/value head, of rows and of packed sequences."""
    cu = torch.tensor([0, 17, 50, 61], dtype=torch.int32)
    boundaries = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    for shape, where, heads, kv_heads in (((2, 61), {}, 12, 6), ((2, 61), {}, 12, 4), ((61,), boundaries, 12, 2)):
        whole = inputs(*shape, heads=heads, kv_heads=kv_heads)
        sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout, cu_seqlens=cu if where else None)
        every = openmoba.moba_select(*whole[:2], block_size=4, top_k=3, **where)
        for lists in (every, every[..., :: heads // kv_heads, :]):
            local = sharding.shard(lists, len(shape) - 1, padding=-1)

            def one(q: Tensor, k: Tensor, v: Tensor, lists: Tensor = lists, where: Any = where) -> Tensor:
                return openmoba.block_attention(q, k, v, lists, block_size=4, **where)

            def many(q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, local: Tensor = local) -> Tensor:
                return parallel.block_attention(q, k, v, local, sharding, block_size=4)

            compare(one, many, whole, sharding)


def few_keys(ranks: int, way: str, layout: str) -> None:
    """Grouped heads with more ranks than key/value heads, and numbers that do not divide each other."""
    sharding = Sharding.over(GROUPS[ranks], 30, way=way, layout=layout)
    for heads, kv_heads in ((6, 1), (12, 4), (12, 2)):
        compare(*moba(), inputs(1, 30, heads=heads, kv_heads=kv_heads), sharding)


def fast_paths(ranks: int, way: str, layout: str) -> None:
    """The CPU's own implementation: by heads the bits of one process."""
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout)
    compare(*moba(), inputs(2, 61, dtype=torch.float32), sharding, None if way == "heads" else 2e-5)


def turns(ranks: int, way: str, layout: str) -> None:
    """One key/value head at a time, whose gathered keys are not saved; a whole is 2 x 61 x 6 x 8 numbers."""
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout)
    before, cost.BYTES_PER_TURN = cost.BYTES_PER_TURN, 0
    try:
        compare(*moba(), inputs(2, 61), sharding)
        compare(*moba(), inputs(2, 61, dtype=torch.float32), sharding, None if way == "heads" else 2e-5)
        local = [sharding.shard(x).requires_grad_() for x in inputs(1, 61, dtype=torch.float32)]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            moba()[1](*local, sharding)
    finally:
        cost.BYTES_PER_TURN = before
    if way == "keys":
        gathered = [x for x in saved if x.is_floating_point() and sharding.tokens in x.shape]
        assert not gathered, [x.shape for x in gathered]


def key_convolved(ranks: int, way: str, layout: str) -> None:
    """Rows and packed sequences, of chunks longer and shorter than the convolution is wide; NaN crosses no border."""
    cu = torch.tensor([0, 1, 10, 19, 19, 22, 61], dtype=torch.int32)
    goes_on = ~torch.zeros(62, dtype=torch.bool).index_fill(0, cu.long(), True)[None, :61]
    generator = torch.Generator().manual_seed(0)
    for tokens, boundaries, width in ((61, None, 4), (61, cu, 4), (61, cu, 17), (7, None, 5), (2, None, 4)):
        sharding = Sharding.over(GROUPS[ranks], tokens, way=way, layout=layout, cu_seqlens=boundaries)
        k, upstream = torch.randn(2, 1, tokens, 6, generator=generator, dtype=torch.float64)
        weight = torch.randn(6, width, generator=generator, dtype=torch.float64).requires_grad_()
        whole = k.clone().requires_grad_()
        expected = key_convolution(whole, weight, None if boundaries is None else goes_on)
        wanted = torch.autograd.grad(expected, (whole, weight), upstream)
        local = sharding.shard(k).requires_grad_()
        out = parallel.key_convolution(local if boundaries is None else local[0], weight, sharding).view_as(local)
        got = torch.autograd.grad(out, (local, weight), sharding.shard(upstream))
        distributed.all_reduce(got[1], group=GROUPS[ranks])
        found = (sharding.unshard(out.detach()), sharding.unshard(got[0]), got[1])
        for x, y in zip((expected.detach(), *wanted), found, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout, cu_seqlens=cu)
    poisoned = torch.where(torch.arange(61) < 22, torch.nan, 1.0)[:, None]
    out = parallel.key_convolution(sharding.shard(poisoned, 0), torch.ones(1, 17), sharding)
    assert sharding.unshard(out, 0)[22:].isfinite().all()


def checkpointed(ranks: int, way: str, layout: str) -> None:
    """Computed again in the backward pass, twice over the same graph."""
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout)
    one, many = moba()

    def again(*x: Any) -> Tensor:
        out: Tensor = checkpoint(many, *x, use_reentrant=False)
        return out

    compare(one, again, inputs(1, 61), sharding)
    q, k, v = (sharding.shard(x).requires_grad_() for x in inputs(1, 61))
    out = many(q, k, v, sharding).sum()
    first, second = (torch.autograd.grad(out, (q, k, v), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def checkpointed_turns(ranks: int, way: str, layout: str) -> None:
    """Computing again ends in the middle of the last turn; what is on its way by then is waited for."""
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout)
    one, many = moba()
    made: list[Exchange] = []
    with (
        patch.object(cost, "BYTES_PER_TURN", 0),
        patch.object(by_heads, "Exchange", lambda group: made.append(Exchange(group)) or made[-1]),
    ):
        compare(one, lambda *x: checkpoint(many, *x, use_reentrant=False), inputs(1, 61), sharding)
    assert len(made) == (2 * 2 * (6 // ranks) if way == "heads" else 0)  # there and back, twice
    assert not any(each.wait() for each in made)


def twice(ranks: int, way: str, layout: str) -> None:
    """No gradients of gradients, not even of the reference's: an error, where they would lack what other ranks add."""
    sharding = Sharding.over(GROUPS[ranks], 30, way=way, layout=layout)
    weight = torch.ones(48, 4, dtype=torch.float64)
    q, k, v = (sharding.shard(x).requires_grad_() for x in inputs(1, 30))
    for out in (
        parallel.moba_attention(q, k, v, sharding, block_size=4, top_k=3, impl="reference"),
        parallel.full_attention(q, k, v, sharding),
        parallel.key_convolution(k.flatten(2), weight, sharding),
    ):
        (gradient,) = torch.autograd.grad((out**2).sum(), k, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (gradient**2).sum().backward()


def compiled(ranks: int, way: str, layout: str) -> None:
    """In a compiled function, after key convolution; its graph breaks at both."""
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout)
    one, many = moba()
    weight = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return one(q * 2, key_convolution(k.flatten(2), weight).view_as(k), v) + 1

    @torch.compile(backend="aot_eager", dynamic=False)
    def around(q: Tensor, k: Tensor, v: Tensor, sharding: Sharding) -> Tensor:
        convolved = parallel.key_convolution(k.flatten(2), weight, sharding).view_as(k)
        return many(q * 2, convolved, v, sharding) + 1

    compare(alone, around, inputs(1, 61, dtype=torch.float32), sharding, 2e-5)
    q, k, v = (sharding.shard(x) for x in inputs(1, 61, dtype=torch.float32))
    calls = (many, (q, k, v, sharding)), (parallel.key_convolution, (k.flatten(2), weight, sharding))
    for call, given in calls:
        with pytest.raises(RuntimeError, match="compilers do not trace transfers"):
            torch.compile(call, backend="eager", fullgraph=True, dynamic=False)(*given)


def autocast(ranks: int, way: str, layout: str) -> None:
    """Computed, and sent, in autocast's dtype."""
    sharding = Sharding.over(GROUPS[ranks], 61, way=way, layout=layout)
    one, many = moba()
    with torch.autocast("cpu", torch.bfloat16):
        out = many(*(sharding.shard(x) for x in inputs(1, 61, dtype=torch.float32)), sharding)
        expected = one(*inputs(1, 61, dtype=torch.float32))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(sharding.unshard(out), expected, rtol=2e-2, atol=2e-2)


def volumes(ranks: int, way: str, layout: str) -> None:
    """What is sent is what the cost model says."""
    sharding = Sharding.over(GROUPS[ranks], 60, way=way, layout=layout)
    sent = 0
    send, gather = distributed.batch_isend_irecv, collectives.gather

    def counted_send(operations: list[Any]) -> Any:
        nonlocal sent
        sent += sum(each.tensor.numel() for each in operations if each.op is distributed.isend)
        return send(operations)

    def counted_gather(x: Tensor, group: Any) -> Any:
        nonlocal sent
        sent += x.numel() * (ranks - 1)
        return gather(x, group)

    with (
        patch.object(distributed, "batch_isend_irecv", counted_send),
        patch.object(keys, "gather", counted_gather),
    ):
        for heads, kv_heads in ((12, 6), (12, 4), (12, 1)):
            sent = 0
            local = [sharding.shard(x).requires_grad_() for x in inputs(1, 60, heads=heads, kv_heads=kv_heads)]
            out = moba()[1](*local, sharding)
            assert sent == pytest.approx(60 * 8 * values_sent(way, heads, kv_heads, ranks, backward=False))
            out.sum().backward()
            assert sent == pytest.approx(60 * 8 * values_sent(way, heads, kv_heads, ranks))


def refusals(ranks: int, way: str, layout: str) -> None:
    """One sentence with the way out, before anything is sent."""
    group = GROUPS[ranks]
    sharding = Sharding.over(group, 30, way=way, layout=layout)
    q, k, v = (sharding.shard(x) for x in inputs(1, 30, heads=5, kv_heads=5))
    many = moba()[1]
    if way == "heads":
        refuses(lambda: many(q, k, v, sharding), f"each of {ranks} ranks as many query heads, and there are 5")
        assert Sharding.over(group, 30).resolved(5, 5) == "keys"
    refuses(lambda: many(q[:, 1:], k, v, sharding), "cut it with Sharding.shard")
    refuses(lambda: many(q[0], k[0], v[0], sharding), "need a sharding with cu_seqlens")
    refuses(lambda: many(q, k, v[:, :, 1:], sharding), "v must have k's shape")
    lists = torch.full((1, q.shape[1] + 1, 5, 2), -1, dtype=torch.int32)
    refuses(lambda: parallel.block_attention(q, k, v, lists, sharding, block_size=4), "do not fit q's")
    keys_BSC, weight = k.flatten(2), torch.zeros(40, 4)
    refuses(lambda: parallel.key_convolution(keys_BSC[:, 1:], weight, sharding), "k holds")
    refuses(lambda: parallel.key_convolution(keys_BSC[0], weight, sharding), "need a sharding with cu_seqlens")
    refuses(lambda: parallel.key_convolution(keys_BSC, weight[1:], sharding), "with k's 40 channels, got (39, 4)")
    refuses(lambda: many(q, k[..., 1:], v[..., 1:], sharding), "must have one batch and one head width")
    refuses(lambda: many(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), sharding), "must have one batch")
    refuses(lambda: parallel.key_convolution(keys_BSC.int(), weight, sharding), "k has dtype torch.int32; use")
    refuses(lambda: Sharding.over(group, 30.5), "at least 1 token, got 30.5")
    refuses(lambda: sharding.shard(q), "but the sharding is of 30")
    mesh = DeviceMesh("cpu", [[*range(ranks)]], mesh_dim_names=("dp", "cp"), _init_backend=False)
    refuses(lambda: Sharding.over(mesh, 30), "this one has 2, dp, cp; give one of them, such as mesh['cp']")
    refuses(lambda: Sharding.over(group, 0), "at least 1 token, got 0")
    refuses(lambda: Sharding.over(group, 30, way="both"), "way must be one of auto, heads, keys, got 'both'")
    refuses(lambda: Sharding.over(group, 30, layout="zigzag"), "layout must be one of")


def unlike(ranks: int, way: str, layout: str) -> None:
    """Where the last rank calls unlike the others all are told, nothing is on its way, and the next call is right."""
    rank = distributed.get_rank()
    last = rank == ranks - 1
    over = partial(Sharding.over, GROUPS[ranks], way=way, layout=layout)
    sharding, longer = over(30), over(30 + 2 * ranks * last)
    q, k, v = (sharding.shard(x) for x in inputs(2, 30))
    packed = over(30, cu_seqlens=torch.tensor([0, 12 + last, 30], dtype=torch.int32))
    lists = torch.full((*q.shape[:3], 2 - last), -1, dtype=torch.int32)
    many, convolve = moba()[1], parallel.key_convolution
    calls = {
        "q (torch.float64, (": lambda: many(q[last:], k[last:], v[last:], sharding),
        "k (torch.float64, (": lambda: many(q, k[:, :, 3 * last :], v[:, :, 3 * last :], sharding),
        "v (torch.float64, (": lambda: many(q, k, v[:, last:], sharding),
        "q (torch.float": lambda: many(*(x.float() if last else x for x in (q, k, v)), sharding),
        "tokens 3": lambda: many(q, k, v, longer),
        "cu_seqlens [0, 1": lambda: many(q[0], k[0], v[0], packed),
        "way ": lambda: many(q, k, v, replace(sharding, way="auto") if last else sharding),
        "lists (": lambda: parallel.block_attention(q, k, v, lists, sharding, block_size=4),
        "weight_CW (": lambda: convolve(k.flatten(2), torch.zeros(48, 4 - last), sharding),
    }
    for text, call in calls.items():
        refuses(call, f"the {ranks} ranks that share a sequence do not call alike: rank {rank} has {text}")
    compare(*moba(), inputs(2, 30), sharding)


def refuses(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def tensors_of(rank: int, ranks: int) -> list[Tensor]:
    """What a rank has for the others: contiguous, permuted, strided, the same for all, of other widths, and nothing."""
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(ranks, 5, 3, generator=generator),
        torch.randn(4, ranks, 2, 8, generator=generator).bfloat16().transpose(0, 1),
        torch.randint(-9, 9, (2, ranks, 3, 6), generator=generator, dtype=torch.int32)[1, :, :, ::2],
        torch.randn(1, 3, 4, generator=generator).expand(ranks, 3, 4),
        torch.randn(ranks, generator=generator),
        torch.randn(ranks, 0, 3, generator=generator),
    ]


def exchanged(group: Any) -> None:
    """Several tensors at once, two exchanges at once, and none of the bytes of those that sent."""
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    sent = [tensors_of(rank + turn, ranks) for turn in (0, 7)]
    exchanges = [Exchange(group) for _ in sent]
    coming = [exchange.start(*tensors) for exchange, tensors in zip(exchanges, sent, strict=True)]
    for turn, exchange, its in reversed(list(zip((0, 7), exchanges, coming, strict=True))):
        assert exchange.wait() is its
        assert exchange.wait() == ()
        expected = zip(*(tensors_of(sender + turn, ranks) for sender in range(ranks)), strict=True)
        for found, parts in zip(its, expected, strict=True):
            assert found.is_contiguous()
            assert torch.equal(found, torch.stack([x[rank] for x in parts]))
    for tensors, turn in zip(sent, (0, 7), strict=True):
        assert all(map(torch.equal, tensors, tensors_of(rank + turn, ranks)))
    with pytest.raises(AssertionError, match="has not been waited for"):
        exchanges[0].start(*exchanges[0].start(torch.ones(ranks)))
    exchanges[0].wait()


def exchanged_gradients(group: Any) -> None:
    """By the weights that the other ranks gave what they got; of what needs none, and of what nobody used."""
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)

    def weights(rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        x, y = torch.randn(2, ranks, 6, 4, generator=generator, dtype=torch.float64)
        return x, y

    x, y, unused = torch.randn(3, 6, ranks, 4, dtype=torch.float64).requires_grad_().unbind()
    constant, lists = torch.randn(ranks, 2), torch.ones(ranks, 3, dtype=torch.int32)
    exchange = Exchange(group)
    tensors = (x.transpose(0, 1), constant, y.transpose(0, 1), lists, unused.transpose(0, 1))
    got = arrived(exchange, *started(exchange, *tensors))
    out = sum((mine * weight).sum() for mine, weight in zip((got[0], got[2]), weights(rank), strict=True))
    for _ in range(2):
        found = torch.autograd.grad(out, (x, y, unused), retain_graph=True)
        for i in range(2):
            expected = torch.stack([weights(other)[i][rank] for other in range(ranks)], 1)
            assert torch.equal(found[i], expected)
        assert not found[2].any()
    with torch.no_grad():
        assert not arrived(exchange, *started(exchange, x.transpose(0, 1)))[0].requires_grad


def unanswered() -> None:
    """One does not answer: the others end with one sentence, after the timeout. The last check: it breaks groups."""
    group = distributed.new_group(range(3), timeout=timedelta(seconds=5))  # enough to find each other, too
    if distributed.get_rank() == 2:
        distributed.barrier()
        return
    for way in ("heads", "keys"):
        sharding = Sharding.over(group, 30, way=way)
        with pytest.raises(RuntimeError) as lost:
            moba()[1](*(sharding.shard(x) for x in inputs(1, 30)), sharding)
        assert "another process has ended, or does not answer" in str(explain(lost.value)), lost.value
    distributed.barrier()


def groups(*_: Any) -> None:
    """Groups of the first two and three processes, and of the last two, which have other numbers in it."""
    ranks = distributed.get_world_size()
    GROUPS.update({n: distributed.new_group(range(n), timeout=PATIENCE) for n in range(2, ranks + 1)})
    GROUPS["last"] = distributed.new_group(range(ranks - 2, ranks), timeout=PATIENCE)


CASES = (
    rows,
    full_rows,
    packed,
    given_blocks,
    few_keys,
    fast_paths,
    turns,
    key_convolved,
    checkpointed,
    checkpointed_turns,
    twice,
    compiled,
    autocast,
    volumes,
    refusals,
    unlike,
)


def all_checks() -> dict[str, Callable[[], Any]]:
    """Every case over two and three processes, in every way and layout."""
    checks: dict[str, Callable[[], Any]] = {"groups": groups}
    for case, ranks, (way, layout) in product(CASES, (2, 3), WAYS):
        # Making a graph takes longer than all else: over three processes by heads, over two by keys.
        if case is not compiled or (ranks, way, layout) in ((3, "heads", "contiguous"), (2, "keys", "head-tail")):
            checks[f"{case.__name__}-{ranks}-{way}-{layout}"] = partial(_in_group, case, ranks, way, layout)
    for case, group in product((exchanged, exchanged_gradients), (2, 3, "last")):
        checks[f"{case.__name__}-{group}"] = partial(_within, case, group)
    return checks | {"unanswered": unanswered}


def _in_group(case: Callable[..., None], ranks: int, way: str, layout: str) -> None:
    if distributed.get_rank() < ranks:
        case(ranks, way, layout)


def _within(case: Callable[..., None], group: int | str) -> None:
    if distributed.get_rank(GROUPS[group]) >= 0:
        case(GROUPS[group])


if __name__ == "__main__":
    run_checks(all_checks())
