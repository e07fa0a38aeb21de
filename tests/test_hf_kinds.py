"""A kind of attention of one's own: two methods, and padding, packing, caches and graphs work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from caches import check_left_padding, generate, in_pieces, new_cache  # noqa: E402
from decoders import build, logits, tokens  # noqa: E402
from test_hf_rows import apart, packed_row  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.layout import Sequences  # noqa: E402


@dataclass(frozen=True)
class Sink:
    """Each query reads the first token of its sequence and the last few."""

    last: int

    def reads_all(self, keys: int) -> bool:
        return keys <= self.last + 1

    def rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        back_TS = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        reads_TS = (back_TS >= 0) & ((back_TS < self.last) | (torch.arange(k.shape[1]) == 0))
        logit_BHTS = scale * torch.einsum("bthd,bshd->bhts", q, k)
        return torch.einsum("bhts,bshd->bthd", logit_BHTS.masked_fill(~reads_TS, -torch.inf).softmax(-1), v)

    def sequences(self, q: Tensor, k: Tensor, v: Tensor, where: Sequences, scale: float) -> Tensor:
        bounds = zip(pairwise(where.cu_q.tolist()), pairwise(where.cu_k.tolist()), strict=True)
        parts = [self.rows(q[None, a:b], k[None, c:d], v[None, c:d], scale)[0] for (a, b), (c, d) in bounds]
        return torch.cat(parts)


@pytest.fixture
def model() -> Any:
    """One layer of the new kind between one of MoBA and a full one."""
    model = configure(build(), MobaConfig(4, 2, full_layers=1))
    model.model.layers[1].self_attn.moba = Sink(5)
    return model


def test_it_is_what_runs(model: Any) -> None:
    ids = tokens(1, 23)
    out = logits(model, ids)
    for settings in (MobaConfig(4, 2, full_layers=1), MobaConfig(4, 2, full_layers=2)):
        assert not torch.allclose(logits(configure(model, settings), ids), out, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cuts", [[7], [26, 3]], ids=str)
def test_padding_and_caches(model: Any, cuts: list[int], kind: str) -> None:
    check_left_padding(model, kind, cuts, (33, 21, 8))


def test_packed_rows(model: Any) -> None:
    ids, positions = packed_row()
    torch.testing.assert_close(logits(model, ids, position_ids=positions, use_cache=False), apart(model, ids))


def test_generation(model: Any) -> None:
    ids, cache = tokens(1, 21), new_cache("dynamic", model)
    greedy = generate(model, ids)
    whole = in_pieces(model, greedy[:, :-1], [21], cache)
    assert whole[:, 20:].argmax(-1).equal(greedy[:, 21:])
