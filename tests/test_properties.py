"""The CPU path against an fp64 oracle, over shapes and settings drawn by hypothesis.

The discrete choice is tested on small whole numbers, where scores are exact and ties frequent; the continuous sum
on normal values, with the oracle given the same choice.
"""

import contextlib
from itertools import pairwise
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_as_exact_as_plain, with_gradients

from openmoba import moba_attention, moba_select
from openmoba.ops import cpu, selection, tiles

LENGTHS = [1, 2, 5, 15, 16, 17, 37, 63, 64, 65]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
drawn = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


class Case(NamedTuple):
    """One call: sizes, settings, and whether limits are so small that every loop turns many times."""

    batch: int
    queries: int
    keys: int
    kv_heads: int
    group: int
    width: int
    block_size: int
    top_k: int
    dtype: torch.dtype
    tiny: bool
    seed: int

    def tensors(self, draw):
        """q, k, v and the gradient of the output, from `draw(shape)`."""
        q = self.batch, self.queries, self.kv_heads * self.group, self.width
        k = self.batch, self.keys, self.kv_heads, self.width
        return [draw(shape).to(self.dtype) for shape in (q, k, k, q)]

    def normal(self):
        generator = torch.Generator().manual_seed(self.seed)
        return self.tensors(lambda shape: torch.randn(shape, generator=generator))

    def whole_numbers(self):
        generator = torch.Generator().manual_seed(self.seed)
        return self.tensors(lambda shape: torch.randint(-2, 3, shape, generator=generator))

    @property
    def settings(self):
        return {"block_size": self.block_size, "top_k": self.top_k}


@st.composite
def cases(draw, dtypes=DTYPES, lengths=LENGTHS):
    """Truly sparse calls: fewer blocks read than there are, where there are two or more."""
    keys = draw(st.sampled_from(lengths))
    queries = draw(st.sampled_from([n for n in lengths if n <= keys]))
    block_size = draw(st.sampled_from([b for b in (1, 2, 3, 7, 16) if b <= keys]))
    blocks = -(-keys // block_size)
    return Case(
        batch=draw(st.sampled_from([1, 2])),
        queries=queries,
        keys=keys,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 5])),
        width=draw(st.sampled_from([8, 13, 64])),
        block_size=block_size,
        top_k=draw(st.integers(1, max(1, min(blocks - 1, 9)))),
        dtype=draw(st.sampled_from(dtypes)),
        tiny=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@contextlib.contextmanager
def limits(tiny):
    """Working-set limits far below the sizes of these tests, or as they are."""
    if not tiny:
        yield
        return
    small = {
        (tiles, "PARTIALS_AT_ONCE"): 50,
        (tiles, "ROWS_PER_BLOCK"): 2,
        (tiles, "TILE_ROWS"): (8, 4, 2),
        (selection, "SCORES_AT_ONCE"): 60,
        (cpu, "BYTES_AT_ONCE"): 2000,
    }
    usual = {(module, name): getattr(module, name) for module, name in small}
    try:
        for (module, name), value in small.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in usual.items():
            setattr(module, name, value)


@drawn
@given(cases())
def test_choice_equals_the_reference(case):
    q, k, _, _ = case.whole_numbers()
    k = k * case.block_size  # whole means, so that scores are exact in every precision
    with limits(case.tiny):
        selected = moba_select(q, k, **case.settings, impl="cpu")
    assert torch.equal(selected, moba_select(q.double(), k.double(), **case.settings, impl="reference"))


@drawn
@given(cases())
def test_output_and_gradients_against_fp64(case):
    tensors = case.normal()
    with limits(case.tiny):
        selected = moba_select(*tensors[:2], **case.settings, impl="cpu")
        actual = with_gradients(lambda q, k, v: moba_attention(q, k, v, **case.settings, impl="cpu"), tensors)
    assert_as_exact_as_plain(actual, tensors, selected, case.block_size)


@drawn
@given(st.lists(cases(dtypes=[torch.float32], lengths=[1, 3, 7, 8, 20]), min_size=1, max_size=4), st.data())
def test_packed_equals_each_sequence_alone(sequences, data):
    first = sequences[0]._replace(batch=1)
    sequences = [first._replace(queries=case.queries, keys=case.keys, seed=case.seed) for case in sequences]
    alone = [case.normal() for case in sequences]
    empty = [x[:, :0] for x in alone[0]]
    unused_keys = [empty[0], *alone[0][1:3], empty[3]]
    for extra in data.draw(st.lists(st.sampled_from([0, 1]), max_size=2)):
        alone.insert(data.draw(st.integers(0, len(alone))), (empty, unused_keys)[extra])
    packed = [torch.cat(x, dim=1)[0] for x in zip(*alone, strict=True)]
    cu_q, cu_k = (boundaries([x[i].shape[1] for x in alone]) for i in (0, 1))
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    with limits(first.tiny):
        together = with_gradients(lambda q, k, v: moba_attention(q, k, v, **first.settings, **cu, impl="cpu"), packed)
        expected = [
            with_gradients(lambda q, k, v: moba_attention(q, k, v, **first.settings, impl="cpu"), x) for x in alone
        ]
        selected = moba_select(packed[0], packed[1], **first.settings, **cu, impl="cpu")
    for actual, parts in zip(together, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.cat(parts, dim=1)[0], atol=1e-5, rtol=1e-5)
    for (start, end), (q, k, _, _) in zip(pairwise(cu_q.tolist()), alone, strict=True):
        assert torch.equal(selected[start:end], moba_select(q, k, **first.settings, impl="cpu")[0])


@drawn
@given(cases(dtypes=[torch.float32]), st.data())
def test_chunked_prefill_equals_one_pass(case, data):
    case = case._replace(queries=case.keys)
    q, k, v, _ = case.normal()
    cuts = sorted(data.draw(st.sets(st.integers(1, case.keys), max_size=4)) | {0, case.keys})
    with limits(case.tiny):
        whole = moba_attention(q, k, v, **case.settings, impl="cpu")
        pieces = [moba_attention(q[:, a:b], k[:, :b], v[:, :b], **case.settings, impl="cpu") for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-6, rtol=1e-5)


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
