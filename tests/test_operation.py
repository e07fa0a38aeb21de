"""The door between operations and torch: each one among fake tensors, traced, in batches, and as torch checks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from openmoba import (
    block_attention,
    complete_paged,
    complete_pages,
    moba_attention,
    moba_decode,
    moba_paged,
    moba_select,
    new_centroids,
    new_paged_centroids,
)
from openmoba.ops.arguments import KeyCache
from openmoba.ops.backends import paged_decoder
from openmoba.ops.decode import decode
from openmoba.ops.operation import is_plain

SETTINGS = {"block_size": 4, "top_k": 2}
LENGTHS = torch.tensor([9, 8], dtype=torch.int32)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(queries: int = 9) -> tuple[Tensor, ...]:
    return normal(2, queries, 2, 8), normal(2, 9, 1, 8), normal(2, 9, 1, 8) + 1


def pages(keys: Tensor, lengths: Tensor = LENGTHS) -> Tensor:
    """Centroids of a cache's complete pages, zeros in the others."""
    centroids = new_centroids(keys, 9, 4).zero_()
    complete_pages(centroids, keys, lengths, None, 9, 4)
    return centroids


Verb = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def attention(impl: str) -> Verb:
    return lambda q, k, v: moba_attention(q, k, v, **SETTINGS, impl=impl), qkv()


def lists() -> Tensor:
    """Past blocks of nine tokens in blocks of four: in no order, with repeats and with none."""
    own_T11 = torch.arange(9)[:, None, None] // 4
    return ((own_T11 + torch.tensor([1, 0, 3])) % (own_T11 + 1) - 1).int().expand(2, 9, 1, 3).contiguous()


def given_blocks(impl: str) -> Verb:
    def call(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        out, lse = block_attention(q, k, v, blocks, block_size=4, return_lse=True, impl=impl)
        return torch.cat([out, lse[..., None]], -1)

    return call, (*qkv(), lists())


def selection(impl: str) -> Verb:
    return lambda q, k: moba_select(q, k, **SETTINGS, impl=impl), qkv()[:2]


def decoding(impl: str) -> Verb:
    q, k, v = qkv(1)
    return lambda *x: moba_decode(*x, **SETTINGS, impl=impl), (q, k, v, pages(k), LENGTHS)


def completion(impl: str) -> Verb:
    return lambda k, lengths: pages(k, lengths), (qkv()[1], LENGTHS)


TABLE = torch.tensor([[5, 2, 0], [5, 1, 3]], dtype=torch.int32)
NEWS = torch.tensor([2, 1], dtype=torch.int32)


def starts_of(news: Tensor) -> Tensor:
    return torch.cat([news.new_zeros(1), news.cumsum(0)]).int()


def paged_centroids(k_pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Centroids of two sequences that share a page, zeros in the others."""
    centroids = new_paged_centroids(k_pages, 4).zero_()
    complete_paged(centroids, k_pages, table, lengths, starts_of(lengths), 4)
    return centroids


def over_pages(impl: str) -> Verb:
    def call(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, *where: Tensor) -> Tensor:
        table, lengths, news = where
        return moba_paged(q, k, v, centroids, table, lengths, starts_of(news), **SETTINGS, impl=impl)

    k, v = normal(6, 4, 1, 8), normal(6, 4, 1, 8) + 1
    return call, (normal(3, 2, 8), k, v, paged_centroids(k, TABLE, LENGTHS), TABLE, LENGTHS, NEWS)


def completion_of_pages(impl: str) -> Verb:
    return lambda *x: paged_centroids(*x), (normal(6, 4, 1, 8), TABLE, LENGTHS)


PAGED = (over_pages, completion_of_pages)
VERBS = [
    (attention, "cpu"),
    (attention, "reference"),
    (given_blocks, "cpu"),
    (given_blocks, "reference"),
    (selection, "cpu"),
    (selection, "reference"),
    (decoding, "triton"),
    (decoding, "reference"),
    (completion, "reference"),
    (over_pages, "triton"),
    (over_pages, "reference"),
    (completion_of_pages, "reference"),
]
each_verb = pytest.mark.parametrize(("verb", "impl"), VERBS, ids=lambda x: getattr(x, "__name__", x))


def like(actual: Tensor, expected: Tensor) -> None:
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)


@each_verb
def test_among_fake_tensors(verb, impl):
    call, inputs = verb(impl)
    expected = call(*inputs)
    with FakeTensorMode() as mode:
        like(call(*(mode.from_tensor(x) for x in inputs)), expected)


@each_verb
def test_one_fake_tensor_is_enough(verb, impl):
    """Whichever it is: no kernel may look for numbers in it."""
    call, inputs = verb(impl)
    expected = call(*inputs)
    for i in range(len(inputs)):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            like(call(*(mode.from_tensor(x) if i == j else x for j, x in enumerate(inputs))), expected)


def check_traced(verb: Callable[[str], Verb], impl: str, mode: str) -> None:
    call, inputs = verb(impl)
    graph = make_fx(call, tracing_mode=mode)(*inputs)
    whole = impl != "reference" or verb in PAGED
    assert ("openmoba." in graph.code) == whole, "torch operations are traced one by one"
    others = [x.flip(0) for x in inputs]
    assert torch.equal(graph(*others), call(*others))


@each_verb
def test_traced(verb, impl):
    check_traced(verb, impl, "real")


@pytest.mark.parametrize(
    ("verb", "impl"),
    [
        (attention, "cpu"),
        (given_blocks, "cpu"),
        (selection, "cpu"),
        (decoding, "triton"),
        (over_pages, "triton"),
        (completion_of_pages, "reference"),
    ],
)
def test_traced_with_symbols_for_lengths(verb, impl):
    check_traced(verb, impl, "symbolic")


@each_verb
def test_in_batches(verb, impl):
    """All inputs in batches, or one of them, and not in their first dimension."""
    call, inputs = verb(impl)
    others = [x.flip(0) for x in inputs]
    expected = torch.stack([call(*inputs), call(*others)])
    together = [torch.stack(pair, 1) for pair in zip(inputs, others, strict=True)]
    torch.testing.assert_close(vmap(call, in_dims=1)(*together), expected)
    new = verb in (completion, completion_of_pages)  # centroids, which are in batches if their keys are
    for i in range(1 if new else len(inputs)):
        given = [together[i] if i == j else x for j, x in enumerate(inputs)]
        one = vmap(call, in_dims=tuple(1 if i == j else None for j in range(len(inputs))))(*given)
        torch.testing.assert_close(one[0], expected[0])
        torch.testing.assert_close(one[1], call(*(others[j] if i == j else x for j, x in enumerate(inputs))))


@pytest.mark.parametrize(("verb", "impl"), [x for x in VERBS if x[0] is not completion_of_pages])
def test_functionalized(verb, impl):
    call, inputs = verb(impl)
    assert torch.equal(functionalize(call)(*inputs), call(*inputs))


@each_verb
def test_compiled_in_one_graph(verb, impl):
    torch.compiler.reset()
    call, inputs = verb(impl)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))


def settings_of(name: str) -> tuple[Any, ...]:
    q, k, v = qkv()
    saved = torch.ops.openmoba.attend("cpu", q, k, v, None, None, None, 4, 2, 0.3)
    inputs = [x.requires_grad_() for x in qkv()]
    _, over = over_pages("reference")
    return {
        "attend": ("cpu", *inputs, None, None, None, 4, 2, 0.3),
        "attend given": ("cpu", *inputs, lists(), None, None, 4, 4, 0.3),
        "attend_backward": ("cpu", q, None, q, k, v, *saved, None, None, 4, 2, 0.3),
        "attend_backward lse": ("cpu", q, q[..., 0], q, k, v, *saved, None, None, 4, 2, 0.3),
        "select": ("cpu", q, k, None, None, 4, 2),
        "decode": ("triton", q[:, -2:], pages(k), k, LENGTHS, None, 4, v, 2, 0.3),
        "write_pages": ("triton", pages(k), k, LENGTHS, None, 4, 9),
        "attend_paged": ("triton", over[0], over[3], over[1], TABLE, LENGTHS, starts_of(NEWS), 4, over[2], 2, 0.3),
        "attend_paged reference": (
            "reference", over[0], over[3], over[1], TABLE, LENGTHS, starts_of(NEWS), 4, over[2], 2, 0.3,
        ),
        "write_paged": ("triton", over[3], over[1], TABLE, LENGTHS, starts_of(LENGTHS), 4),
        "write_paged reference": ("reference", over[3], over[1], TABLE, LENGTHS, starts_of(LENGTHS), 4),
    }[name]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch 2.14 to itself
@pytest.mark.parametrize(
    "name",
    [
        "attend",
        "attend given",
        "attend_backward",
        "attend_backward lse",
        "select",
        "decode",
        "write_pages",
        "attend_paged",
        "attend_paged reference",
        "write_paged",
        "write_paged reference",
    ],
)
def test_registration(name):
    torch.library.opcheck(getattr(torch.ops.openmoba, name.split()[0]).default, settings_of(name))


def test_the_registered_pages_write_in_batches():
    """Also where a batch's elements are not contiguous."""
    _, keys, _ = qkv()
    both = torch.stack([keys, keys.flip(0)], -1)
    centroids = torch.zeros(*pages(keys).shape, 2)

    def write(c: Tensor, k: Tensor) -> Tensor:
        torch.ops.openmoba.write_pages("triton", c, k, LENGTHS, None, 4, 9)
        return c

    vmap(write, -1)(centroids, both)
    expected = torch.zeros_like(centroids)
    for i in range(2):
        torch.ops.openmoba.write_pages(
            "triton", alone := expected[..., i].clone(), both[..., i].contiguous(), LENGTHS, None, 4, 9
        )
        expected[..., i] = alone
    assert expected.abs().sum() > 0
    assert torch.equal(centroids, expected)


@pytest.mark.parametrize("verb", [completion, completion_of_pages])
def test_batches_are_not_written_where_there_is_one_place(verb):
    """The centroids of all elements would be those of the last."""
    _, (keys, *where) = verb("triton")
    centroids = torch.ones(6, 1, 1, 8) if where[1:] else torch.ones(2, 2, 1, 8)

    def write(k: Tensor) -> None:
        if where[1:]:
            complete_paged(centroids, k, *where, starts_of(LENGTHS), 4)
        else:
            torch.ops.openmoba.write_pages("triton", centroids, k, LENGTHS, None, 4, 9)

    with pytest.raises(ValueError, match="write the results of all its elements to the same tensor"):
        vmap(write)(torch.stack([keys, keys + 1]))
    assert centroids.eq(1).all()


def test_there_is_no_other_backend():
    q, k, v = qkv()
    cache = KeyCache(pages(k), k, LENGTHS, None, 4)
    for call in (
        lambda: torch.ops.openmoba.select("gpu", q, k, None, None, 4, 2),
        lambda: decode("cpu", q, cache, v, 2, 0.3),
        lambda: paged_decoder("cpu"),
    ):
        with pytest.raises(ValueError, match=r"there is no backend '[cg]pu'"):
            call()


def test_what_is_plain():
    x = torch.ones(2)
    assert is_plain(("cpu", x, None, torch.nn.Parameter(x), 1, 0.5))
    assert not is_plain(("cpu", x.to("meta"), x))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not is_plain(("cpu", x, x))
    assert not is_plain(("cpu", x, fake))
    seen = []
    vmap(lambda y: seen.append(is_plain(("cpu", x, x))) or y)(x)
    assert seen == [False]
