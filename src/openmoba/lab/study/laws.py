"""The laws of a study's arms, the runs that they are fitted through, and where two of them may be compared."""

# N runs, W validation windows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openmoba.lab.measure.compute import AXES
from openmoba.lab.measure.resample import Floats, Interval, Numbers
from openmoba.lab.study.compare import common_documents
from openmoba.lab.study.fit import Fit, fit_arms, fit_runs
from openmoba.lab.study.groups import by, of_same_seeds
from openmoba.lab.study.outcomes import Loss, Outcome

LEAST_SIZES = 3
"""Of an arm, to have a law: through two any line goes, and nothing checks it."""


def comparable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs that laws are fitted through, in charts, tables and sentences alike.

    They are of the sizes and seeds that every arm with `LEAST_SIZES` sizes has; arms with fewer have no law.

    Args:
        outcomes: those that one stage compares.
    """
    arms = [own for own in by("arm", of_same_seeds(outcomes)).values() if len(by("size", own)) >= LEAST_SIZES]
    if not arms:
        return []
    shared = set.intersection(*({(run.run.size, run.run.seed) for run in own} for own in arms))
    return [run for own in arms for run in own if (run.run.size, run.run.seed) in shared]


def fit(outcomes: Sequence[Outcome], kind: Loss, axis: str) -> Fit | None:
    """Fit the law through the ends of one arm's runs, as `comparable` gives them.

    None if they are of fewer than `LEAST_SIZES` sizes or amounts of compute, lack this loss, or have it of a single
    window, which gives no interval.
    """
    if not _fittable(outcomes, kind, axis):
        return None
    windows, documents = _whole(outcomes, kind)
    return fit_runs(_compute(outcomes, axis), windows, documents) if len(documents) > 1 else None


def fit_pair(first: Sequence[Outcome], second: Sequence[Outcome], kind: Loss, axis: str) -> tuple[Fit, Fit] | None:
    """Fit the laws of two arms with the same draws, over the sizes and seeds that both have; None where `fit` is."""
    own, other = ({(run.run.size, run.run.seed): run for run in runs} for runs in (first, second))
    pairs = [(run, other[key]) for key, run in own.items() if key in other]
    arms = [[pair[arm] for pair in pairs] for arm in (0, 1)]
    if not all(_fittable(runs, kind, axis) for runs in arms):
        return None
    windows, documents = _whole([*arms[0], *arms[1]], kind)
    if len(documents) < 2:
        return None
    by_arm = list(windows.reshape(2, len(pairs), -1))
    one, two = fit_arms([_compute(runs, axis) for runs in arms], by_arm, documents)
    return one, two


def slope_difference(first: Fit, second: Fit) -> Interval:
    """Return the interval of the first exponent minus the second's, over replicates that share their draws."""
    return Interval.of(first.replicates[:, 1] - second.replicates[:, 1])


def residual(*laws: Fit) -> float:
    """Return the largest distance of a run from its law, as a share of the loss."""
    return max(float(abs(law.residual).max()) for law in laws)


@dataclass(frozen=True)
class Versus:
    """The laws of an arm and of another, of the same sizes and seeds.

    Attributes:
        own, other: the runs of the two arms.
        laws: theirs, fitted with the same draws.
    """

    own: Sequence[Outcome]
    other: Sequence[Outcome]
    laws: tuple[Fit, Fit]

    @classmethod
    def of(cls, own: Sequence[Outcome], other: Sequence[Outcome], kind: Loss, axis: str) -> Versus | None:
        """Fit both; None where `fit_pair` is."""
        laws = fit_pair(own, other, kind, axis)
        return None if laws is None else cls(own, other, laws)

    @property
    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Least and most compute of each arm's runs."""
        first, second = ((float(law.compute.min()), float(law.compute.max())) for law in self.laws)
        return first, second

    @property
    def overlap(self) -> bool:
        """Whether the two have spent some compute alike; where not, a comparison would go beyond what was run."""
        (start, end), (other_start, other_end) = self.ranges
        return max(start, other_start) <= min(end, other_end)

    @property
    def compute(self) -> float:
        """The most compute that both have spent."""
        return min(end for _, end in self.ranges)

    @property
    def share(self) -> float:
        """How far the arm's law lies from the other's there, as a share of the other's."""
        assert self.overlap, "laws are not compared beyond their runs"
        return float(self.laws[0].law(self.compute) / self.laws[1].law(self.compute)) - 1

    @property
    def interval(self) -> Interval:
        """That of `share`."""
        low, high = (float(end[0]) - 1 for end in self.laws[0].ratio(self.laws[1], [self.compute]))
        return Interval(low, high)

    @property
    def sizes(self) -> int:
        """How many sizes the laws are of."""
        return len(by("size", self.own))

    @property
    def runs(self) -> int:
        """How many runs each law is of."""
        return len(self.laws[0].loss)

    @property
    def seeds_known(self) -> bool:
        """Whether every size has two runs, so that the interval holds the luck of a seed."""
        return self.runs >= 2 * self.sizes


def _fittable(outcomes: Sequence[Outcome], kind: Loss, axis: str) -> bool:
    sizes, amounts = {outcome.run.size for outcome in outcomes}, set(_compute(outcomes, axis))
    return min(len(sizes), len(amounts)) >= LEAST_SIZES and all(outcome.has(kind) for outcome in outcomes)


def _compute(outcomes: Sequence[Outcome], axis: str) -> list[float]:
    return [AXES[axis].value(outcome.final) for outcome in outcomes]


def _whole(outcomes: Sequence[Outcome], kind: Loss) -> tuple[Floats, Numbers]:
    """Return losses `[N, W]` and documents `[W]` of the windows that have this loss in all runs."""
    document_W = common_documents(outcomes, kind)
    windows_NW = np.stack([outcome.windows(kind) for outcome in outcomes])
    whole_W = ~np.isnan(windows_NW).any(axis=0)
    return windows_NW[:, whole_W], document_W[whole_W]
