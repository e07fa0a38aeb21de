"""Attention of one sequence over two and three processes is that of one: the checks are in `parallel_checks.py`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_checks import all_checks, exchanged, exchanged_gradients
from ranks import checked
from torch import Tensor, distributed

from openmoba.parallel import Sharding, block_attention, cost, leave_group, moba_attention, prioritize_transfers
from openmoba.parallel.cost import Call, choose_way, crossover, key_copies, predicted_seconds, values_sent

PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return checked("parallel_checks.py", 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", list(all_checks()))
def test_over_processes(outcomes: dict[str, list[str]], check: str) -> None:
    assert not outcomes[check], "\n".join(outcomes[check])


@pytest.mark.parametrize(("layout", "chunks"), [("contiguous", (0, 1, 2)), ("head-tail", (0, 5, 1, 4, 2, 3))])
def test_every_token_lies_on_one_rank(layout: str, chunks: tuple[int, ...]) -> None:
    """The chunks of the picture in `sharding.py`, whatever the length; padding comes last and is marked."""
    for tokens in (1, 5, 6, 31):
        shardings = [Sharding(tokens, rank, 3, None, layout) for rank in range(3)]
        assert shardings[0].chunks == chunks
        parts = torch.cat([s.shard(torch.arange(tokens), 0, padding=-1) for s in shardings])
        assert len(parts) == 3 * shardings[0].local_tokens
        assert parts[parts >= 0].sort().values.tolist() == list(range(tokens))
        whole = shardings[0].in_order(parts)
        assert whole[:tokens].tolist() == list(range(tokens))
        assert torch.equal(shardings[0].by_rank(whole), parts)


def test_the_rule_is_by_heads_where_all_is_exact_else_by_what_sends_less() -> None:
    assert [choose_way(8 * g, 8, n) for g in (1, 4, 8) for n in (2, 8, 16)] == [
        *("heads", "heads", "keys"),
        *("heads", "heads", "heads"),
        *("heads", "heads", "heads"),
    ]
    assert [choose_way(2 * g, 2, n) for g in (2, 4, 8) for n in (2, 4, 8)] == [
        *("heads", "heads", "keys"),
        *("heads", "heads", "heads"),
        *("heads", "keys", "heads"),
    ]
    for kv_heads, group, ranks in product((1, 2, 6, 8), (1, 3, 4, 8), (1, 2, 3, 4, 6, 8, 16)):
        heads = kv_heads * group
        sends_less = 2 * (group + key_copies(kv_heads, ranks)) <= 3 * ranks
        by_heads = kv_heads % ranks == 0 or (heads % ranks == 0 and sends_less)
        assert choose_way(heads, kv_heads, ranks) == ("heads" if by_heads else "keys")
        assert values_sent("heads", heads, kv_heads, 1) == values_sent("keys", heads, kv_heads, 1) == 0


def test_the_cost_on_paper_hides_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 8 ranks, G = 4, 8 key/value heads, 1,000 tokens, width 1, one byte; 8 s on one device."""
    monkeypatch.setattr(cost, "BYTES_PER_TURN", 2000)  # one head
    call = Call(1000, 8.0, 32, 8, 1, itemsize=1)
    by_heads, by_keys = 2 * 2 * 40 / 8 * 7 / 8 * 1000, 3 * 16 * 7 / 8 * 1000
    fast, slow = 1e9, 1e4
    assert predicted_seconds("heads", call, 8, slow) == pytest.approx(1 + by_heads / slow)
    assert predicted_seconds("keys", call, 8, slow) == pytest.approx(by_keys / slow)  # nothing left to hide behind
    assert predicted_seconds("keys", call, 8, fast) == pytest.approx(1 + by_keys / fast / 8)
    monkeypatch.setattr(cost, "BYTES_PER_TURN", 5999)  # two of three
    assert predicted_seconds("keys", call, 8, fast) == pytest.approx(1 + by_keys / fast / 4)
    monkeypatch.setattr(cost, "BYTES_PER_TURN", 2000)
    equal = crossover(call, 8)
    assert equal is not None
    ways = [predicted_seconds(way, call, 8, equal) for way in ("heads", "keys")]
    assert ways[0] == pytest.approx(ways[1])
    assert predicted_seconds("keys", call, 8, 2 * equal) < predicted_seconds("heads", call, 8, 2 * equal)
    assert predicted_seconds("keys", call, 8, equal / 2) > predicted_seconds("heads", call, 8, equal / 2)


def test_transfers_go_first_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in ((None, "1"), ("0", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {} if before is None else {PRIORITY: before})
            prioritize_transfers()
            assert os.environ == {PRIORITY: after}


def test_a_program_without_process_group_is_told_of_torchrun() -> None:
    with pytest.raises(ValueError, match="start the program with torchrun"):
        Sharding.over(None, 8)


@pytest.fixture
def alone() -> Iterator[None]:
    """One process is the whole group."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def threads_of_gloo() -> int:
    return sum(file.read_text().startswith("pt_gloo") for file in Path("/proc/self/task").glob("*/comm"))


def test_no_thread_outlives_the_group_though_cycles_hold_it() -> None:
    """One that gives a tensor back while the interpreter ends aborts the process."""
    gc.collect()
    before = threads_of_gloo()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    parallel = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    parallel(torch.randn(2, 4)).sum().backward()
    parallel.itself = parallel
    assert threads_of_gloo() > before
    del parallel
    leave_group()
    assert threads_of_gloo() == before


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("check", [exchanged, exchanged_gradients])
def test_one_process_exchanges_with_itself(check: Callable[[Any], None]) -> None:
    check(distributed.group.WORLD)


@pytest.mark.usefixtures("alone")
def test_shardings_are_compared_and_replaced() -> None:
    found = Sharding.over(None, 8)
    assert found == Sharding.over(distributed.group.WORLD, 8)
    assert hash(found) == hash(Sharding.over(None, 8))
    assert replace(found, tokens=9) == Sharding.over(None, 9) != found
    assert found != Sharding.over(distributed.new_group([0]), 8)


def qkv() -> dict[str, Tensor]:
    return {name: torch.randn(1, 8, 2, 8) for name in ("q", "k", "v")}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("way", ["heads", "keys"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks": None}, "blocks must be a torch.Tensor, got NoneType"),
        ({"v": None}, "v must be a torch.Tensor, got NoneType"),
        ({"q": qkv()["q"].half()}, "k has dtype torch.float32 but q has torch.float16"),
    ],
)
def test_what_no_shard_can_be_is_refused(way: str, changed: dict[str, Any], message: str) -> None:
    given = qkv() | {"blocks": torch.full((1, 8, 2, 1), -1).int()} | changed
    with pytest.raises(ValueError, match=message):
        block_attention(**given, sharding=Sharding.over(None, 8, way=way), block_size=4)


@pytest.mark.usefixtures("alone")
def test_double_precision_stays_under_autocast() -> None:
    """As without processes."""
    inputs = [x.double() for x in qkv().values()]
    with torch.autocast("cpu", torch.bfloat16):
        assert moba_attention(*inputs, Sharding.over(None, 8), block_size=4, top_k=2).dtype == torch.float64


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 8], "cu_seqlens must be a torch.Tensor, got list"),
        (torch.tensor([0, 8]), "cu_seqlens must be int32 .*, got torch.int64"),
        (torch.tensor([0, 7]).int(), "must end at q's token count 8, got 7"),
        (torch.tensor([0, 6, 4, 8]).int(), "must not decrease, got 6 then 4"),
    ],
)
def test_boundaries_are_looked_at_where_all_ranks_see_the_same(starts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharding.over(None, 8, cu_seqlens=starts)
