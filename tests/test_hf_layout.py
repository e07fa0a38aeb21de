"""Where the tokens of a batch's rows lie: every form that travels is read back, and every answer is that of a map."""

from __future__ import annotations

import re
import weakref
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from decoders import LAYERS, build, logits, tokens  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure, find_layout, layout  # noqa: E402
from openmoba.hf.layout import Layout, mapped_rows, packed_rows, take, whole_rows  # noqa: E402

MAPS = {
    "left padding": ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], 5),
    "right padding": ([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], 5),
    "a row of padding": ([[0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], 5),
    "packed": ([[1, 1, 2, 3, 3], [1, 1, 1, 1, 1]], 5),
    "packed and padded": ([[1, 1, 0, 2, 2], [0, 1, 2, 2, 0]], 5),
    "a hole": ([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], 5),
    "new tokens after a cache": ([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], 2),
    "a static cache": ([[0, 1, 1, -1, -1], [1, 1, 1, -1, -1]], 2),
}


@pytest.fixture(params=MAPS)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Layout]:
    """A map `[B, S]`, and the layout that reads it."""
    rows, new = MAPS[request.param]
    map_BS = torch.tensor(rows, dtype=torch.int32)
    return map_BS, Layout.read(map_BS[:, None, None], None, None, (len(rows), new), map_BS.shape[1])


def new_slots(map_BS: Tensor, where: Layout) -> list[int]:
    written = sum(slot >= 0 for slot in map_BS[0].tolist())
    return list(range(written - where.queries, written))


def same_sequence(map_BS: Tensor, where: Layout) -> Tensor:
    """Which keys each new token may read by definition, bool `[B, T, S]`."""
    out = torch.zeros(map_BS.shape[0], where.queries, map_BS.shape[1], dtype=torch.bool)
    for row, numbers in enumerate(map_BS.tolist()):
        for query, slot in enumerate(new_slots(map_BS, where)):
            for key in range(slot + 1):
                out[row, query, key] = numbers[slot] > 0 and numbers[key] == numbers[slot]
    return out


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([9, 9, 0, 1, 2], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]),
        ([0, 1, 0, 0, 9], [1, 1, 1, 1, 0], [1, 1, 2, 3, 0]),  # the third sequence is of one token
        ([0, 1, 9, 2, 0], [1, 1, 0, 1, 1], [1, 1, 0, 1, 2]),
    ],
)
def test_positions_say_where_sequences_are_between_padding(
    positions: list[int], mask: list[int], expected: list[int]
) -> None:
    rows = find_layout._rows(torch.tensor([positions]), torch.tensor([mask]), None, False, rotary=True)
    assert rows is not None
    assert rows.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("sees", "causal"),
    [
        (lambda _, __, query, key: key <= query, True),
        (lambda _, __, query, key: key < query + 2, False),
        (lambda _, __, query, key: (key <= query) & (key > query - 3), False),
        (lambda _, __, query, key: (key == 0) | (key == query), False),
    ],
    ids=["causal", "the next", "a window", "the first alone"],
)
def test_a_predicate_that_is_not_causal_is_refused(sees: Any, causal: bool) -> None:
    refused = pytest.raises(ValueError, match="not causal over whole sequences")
    with nullcontext() if causal else refused:
        find_layout._refuse_uncausal(sees, 2, 6, "cpu")


def test_visible_keys(case: tuple[Tensor, Layout]) -> None:
    map_BS, where = case
    assert where.visible_keys()[:, 0].equal(same_sequence(map_BS, where))


def test_sequences(case: tuple[Tensor, Layout]) -> None:
    """Who reads whom in the packed tokens, put back into rows, is who may; padding gets zeros."""
    map_BS, where = case
    found = where.sequences()
    assert found is not None
    assert found.queries is not None
    batch, slots = map_BS.shape
    q_BTHD = torch.zeros(batch, where.queries, 1, batch * slots)
    key_N = take(torch.arange(batch * slots)[None, :, None], found.keys)[:, 0]
    reads_NK = torch.zeros(len(found.queries), 1, batch * slots)
    bounds = (pairwise(cu.tolist()) for cu in (found.cu_q, found.cu_k))
    for (q_start, q_end), (k_start, k_end) in zip(*bounds, strict=True):
        for query in range(q_start, q_end):  # aligned to the end of their keys
            reads_NK[query, 0, key_N[k_start : k_end - (q_end - 1 - query)]] = 1
    got = found.put_back(reads_NK, q_BTHD).view(batch, where.queries, batch, slots).diagonal(dim1=0, dim2=2)
    assert got.permute(2, 0, 1).bool().equal(same_sequence(map_BS, where))
    assert reads_NK.sum() == same_sequence(map_BS, where).sum(), "nobody reads another row"


def test_alignment(case: tuple[Tensor, Layout]) -> None:
    """None unless padding lies before single sequences; without looking, the same for these."""
    map_BS, where = case
    keys_BSHD = torch.zeros(*map_BS.shape, 1, 1)
    expected = []
    for row in map_BS.tolist():
        real = [slot for slot, number in enumerate(row) if number > 0]
        start = real[0] if real else sum(number == 0 for number in row)
        expected.append((start, len(real)) if row[start : start + len(real)] == [1] * len(real) else None)
        if 0 in row[start:]:
            expected[-1] = None
    seen = where.alignment(keys_BSHD, look=True)
    if None in expected:
        assert seen is None
    else:
        assert seen is not None
        assert seen.starts is not None
        assert list(zip(seen.first or (), seen.lengths.tolist(), strict=True)) == expected
        unseen = where.alignment(keys_BSHD, look=False)
        assert unseen is not None
        assert unseen.first is None
        assert seen.lengths.equal(unseen.lengths)
        assert seen.starts.equal(unseen.starts if unseen.starts is not None else -seen.starts)


def test_goes_on_and_padding(case: tuple[Tensor, Layout]) -> None:
    map_BS, where = case
    slots = new_slots(map_BS, where)
    real_BT = torch.tensor([[row[slot] > 0 for slot in slots] for row in map_BS.tolist()])
    ones = torch.ones(*real_BT.shape, 3)
    assert where.without_padding(ones).equal(real_BT[..., None] * ones)
    goes_on = where.goes_on()
    if where.queries < map_BS.shape[1]:
        assert goes_on is None
    else:
        assert goes_on is not None
        expected = [[slot > 0 and row[slot] == row[slot - 1] for slot in slots] for row in map_BS.tolist()]
        assert goes_on.equal(torch.tensor(expected).flatten()[None])


@pytest.mark.parametrize("cuts", [[[7, 3]], [[10]], [[2, 2, 6], [9, 1]], [[5], [5]]], ids=str)
def test_forms_are_read_as_they_were_written(cuts: list[list[int]]) -> None:
    """Packed rows and maps of the same sequences say the same, in the shortest form."""
    map_BS = torch.tensor([[n for n, length in enumerate(row, 1) for _ in range(length)] for row in cuts])
    lengths = [length for row in cuts for length in row]
    whole = len(lengths) == len(cuts)
    starts = torch.zeros(map_BS.numel(), dtype=torch.bool)
    starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    for mask in (packed_rows(starts.view(map_BS.shape)), mapped_rows(map_BS.int())):
        where = Layout.read(mask, None, None, (map_BS.shape[0], map_BS.shape[1]), map_BS.shape[1])
        found, goes_on = where.sequences(), where.goes_on()
        assert (found is None) == (goes_on is None) == whole
        if found is not None and goes_on is not None:
            assert found.cu_q.dtype == found.cu_k.dtype == torch.int32
            assert found.cu_q.diff().tolist() == found.cu_k.diff().tolist() == lengths
            assert goes_on.equal(~starts[None])


def test_boundaries_that_a_caller_gave() -> None:
    """They hold under the form for whole rows, which the hook puts in the place of no mask."""
    ends = torch.tensor([0, 3, 10])
    for mask in (None, whole_rows(torch.zeros(2, 5))):
        found = Layout.read(mask, ends, ends, (2, 5)).sequences()
        assert found is not None
        assert found.cu_q.tolist() == ends.tolist()
        assert found.cu_q.dtype == torch.int32
    with pytest.raises(ValueError, match="both cu_seq_lens_q and cu_seq_lens_k"):
        Layout.read(None, ends, None, (2, 5))
    with pytest.raises(ValueError, match="must be int32 tensors"):
        Layout.read(None, ends.tolist(), ends.tolist(), (2, 5))


@pytest.mark.parametrize("positions", [None, torch.arange(5)[None]], ids=["no positions", "positions"])
def test_a_mask_for_another_number_of_rows_is_refused(positions: torch.Tensor | None) -> None:
    model, mask = configure(build(), MobaConfig(4, 2)), torch.ones(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask has 3 rows, and there are 2 of tokens"):
        model(tokens(2, 5), attention_mask=mask, position_ids=positions)
    mask[:, 0] = 0  # one row is every row's
    one, all_rows = (model(tokens(2, 5), attention_mask=mask[:rows]).logits[:, 1:] for rows in (1, 2))
    assert torch.equal(one, all_rows)


def test_no_tokens_are_refused() -> None:
    for inputs in ({"input_ids": tokens(2, 0)}, {"inputs_embeds": torch.zeros(2, 0, 32)}):
        with pytest.raises(ValueError, match="the model was given no tokens; give it one"):
            configure(build(), MobaConfig(4, 2))(**inputs)


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 5), (1, 1, 1, 5), (2, 1, 1, 4), (2, 2, 1, 5), (2, 5), (2, 1, 3, 1)], ids=str
)
def test_what_is_no_form(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"no custom attention mask, got torch\.int32 \(.*2 x 5 new tokens"):
        Layout.read(torch.ones(shape, dtype=torch.int32), None, None, (2, 5), 5)
    with pytest.raises(ValueError, match=r"no custom attention mask, got torch\.float32"):
        Layout.read(torch.ones(2, 1, 1, 5), None, None, (2, 5), 5)


def test_a_map_is_looked_at_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    count = torch.unique_consecutive
    monkeypatch.setattr(torch, "unique_consecutive", lambda *given: calls.append(given) or count(*given))
    model, ids = configure(build(), MobaConfig(4, 2, full_layers=1)), tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for _ in range(2):
        logits(model, ids, attention_mask=mask, use_cache=False)
    assert len(calls) == 2 < 2 * LAYERS


def test_what_is_remembered_goes_with_the_mask() -> None:
    mask = torch.tensor([[[[0, 0, 1, 1, 1]]]], dtype=torch.int32)
    where, alive = Layout.read(mask, None, None, (1, 5)), weakref.ref(mask)
    answers = [
        where.sequences(),
        where.visible_keys(),
        where.goes_on(),
        where.alignment(mask.view(1, 5, 1, 1), look=True),
    ]
    assert where.visible_keys() is answers[1]
    mask[..., 1] = 1
    assert where.visible_keys() is not answers[1]
    del where, mask
    assert alive() is None


def test_forms_of_the_mask_are_known_in_two_files() -> None:
    """One finds out where tokens lie, the other one is the answer; who reads it asks `Layout`."""
    folder = Path(layout.__file__).parent
    words = re.compile(r"\b(PADDING|UNWRITTEN|whole_rows|packed_rows|mapped_rows)\b|mask\.shape")
    knowing = {path.name for path in folder.glob("*.py") if words.search(path.read_text())}
    assert knowing == {Path(module.__file__).name for module in (layout, find_layout)}
