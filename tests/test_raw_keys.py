"""Key convolution over a block table, by torch operations and by kernels, against whole sequences."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from attending import INTERPRETED
from raw_key_pages import Kept
from torch import Tensor

from openmoba.ops.raw_keys import NewTokens, convolve_paged
from openmoba.ops.triton import raw_keys as kernels

MakeKept = Callable[..., Kept]


pytestmark = INTERPRETED


@pytest.fixture(params=["torch", "triton"])
def new_kept(request: pytest.FixtureRequest) -> MakeKept:
    """Make a server whose keys are convolved by one of the two."""
    return partial(Kept, operation=convolve_paged if request.param == "torch" else by_kernels)


def by_kernels(keys: Tensor, weight: Tensor, raw_keys: Tensor, new: NewTokens) -> None:
    """Convolve by kernels, in the interpreter."""
    batch = new.block_table, new.lengths, new.starts, new.slots
    kernels.convolve_paged(keys, weight, raw_keys, *batch, new.page_size)


def test_chunks_beside_single_tokens(new_kept: MakeKept) -> None:
    kept = new_kept()
    a, b = kept.server.begin(), kept.server.begin()
    for news in ({a: 1}, {a: 1}, {a: 1, b: 19}, {a: 1, b: 1}, {b: 20, a: 2}, {a: 1, b: 1}, {b: 3, a: 40}, {a: 1, b: 1}):
        kept.grow(news)


def test_a_chunk_that_ends_where_its_own_keys_before_it_lie(new_kept: MakeKept) -> None:
    """Each new token has the slot of one that is read: what is read was there before."""
    kept = new_kept(page_size=32)
    a = kept.server.begin()
    for new in (5, 3, 6, 1, 9):
        kept.grow({a: new})


def test_a_shared_prefix(new_kept: MakeKept) -> None:
    """One that goes on while the pages' writer does, and one after the writer has ended."""
    kept = new_kept()
    a = kept.server.begin()
    kept.grow({a: 29})
    b = kept.server.begin(like=a, shared=3)
    kept.grow({b: 2, a: 1})
    kept.end(a)
    c = kept.server.begin(like=b, shared=1)
    kept.grow({b: 1, c: 30})
    kept.grow({b: 1, c: 1})


def test_pages_that_are_shared_in_the_step_that_writes_them(new_kept: MakeKept) -> None:
    kept = new_kept()
    a = kept.server.begin()
    kept.grow({a: 5})
    kept.server.write(a, 16)
    b = kept.server.begin(like=a, shared=2)
    kept.server.write(b, 4)
    kept.check({b: 4, a: 16})


def test_nothing_is_kept_of_tokens_that_are_not_written(new_kept: MakeKept) -> None:
    """Of dummy batches, which vLLM makes to measure, slots are negative."""
    kept = new_kept()
    batch = {
        "block_table": torch.zeros(2, 4, dtype=torch.int32),
        "lengths": torch.tensor([6, 6]),
        "starts": torch.tensor([0, 6, 12]),
        "slots": -8 * torch.arange(1, 13),
    }
    kept.convolve(kept.server.draw(12, len(kept.weight)), **batch)
    assert kept.raw_keys[:-1].isnan().all()


def test_many_channels_are_tiles(new_kept: MakeKept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CHANNELS", 16)
    kernels._launches.cache_clear()
    kept = new_kept(pages=190)
    a, b = kept.server.begin(), kept.server.begin()
    for news in ({a: 5}, {a: 18, b: 2}, {a: 1, b: 1}):
        kept.grow(news)
    kernels._launches.cache_clear()


@pytest.mark.parametrize(("page_size", "width"), [(1, 4), (2, 4), (3, 2), (4, 4), (5, 5), (16, 4)])
def test_requests_come_and_go(page_size: int, width: int, new_kept: MakeKept) -> None:
    """Pages are shared, given back and written again, in any order."""
    kept, rng = new_kept(page_size, width), random.Random(page_size)
    server, alive, steps = kept.server, [], 0
    most = 60 if kept.operation is convolve_paged else 20  # Triton's interpreter is slow
    while steps < most:
        if len(alive) < 4 and len(server.free) > 60:
            like = rng.choice([None, *alive])
            shared = 0 if like is None else rng.randint(0, len(server.keys[like]) // page_size)
            alive.append(server.begin(like, shared))
        news = {request: rng.choice([1, 1, 2, 7, 13]) for request in rng.sample(alive, rng.randint(1, len(alive)))}
        if sum(news.values()) < len(server.free):
            kept.grow(news)
            steps += 1
        if rng.random() < 0.3 or len(server.free) < 40:
            kept.end(alive.pop(rng.randrange(len(alive))))
        if not alive:
            alive.append(server.begin())
