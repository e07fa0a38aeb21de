"""What the routing tests on CPU and GPU share: the fp64 oracle and the distance between two choices."""

from __future__ import annotations

from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.reference import reference_select


def oracle(q: Tensor, k: Tensor, block_size: int, top_k: int, cu_q=None, cu_k=None) -> Tensor:
    """The specified choice, scored in fp64 on the inputs as they are."""
    return reference_select(q.double(), k.double(), Blocking(cu_q, cu_k, block_size, top_k))


def disagreement(selected: Tensor, expected: Tensor) -> float:
    """Share of the expected picks that were not picked, in any order."""
    found = (selected[..., :, None] == expected[..., None, :]).any(-2)
    real = expected >= 0
    return float((real & ~found).sum() / real.sum().clamp(min=1))


def assert_wellformed(selected: Tensor, expected: Tensor) -> None:
    """As many distinct picks as there should be, all in the past, none after the first gap."""
    assert (selected.ge(0) == expected.ge(0)).all()
    ordered = selected.sort(-1).values
    assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all()
