"""One bootstrap for every interval of the laboratory: documents, then their windows, and the luck of seeds.

Windows of one document are alike, so a replicate draws documents with replacement, and from every drawn document
its windows with replacement. A loss is a mean over windows that count equally, so a replicate's loss is the mean
over all windows drawn. All arms and seeds are measured on the same windows and share a replicate's draw: what is
hard for one is hard for the other, and cancels in a difference. Few documents differ less from themselves drawn again
than from all others, so what is drawn of them is moved away from what was measured, as Student's t says (`widened`).

Two or three seeds are too few to draw from: the interval of three equal draws is their range, which holds the mean
of all seeds three times in four. So their spread is pooled over the arms that have several seeds (`SeedNoise`), and
a replicate adds a deviation from Student's t. An arm with one seed takes that noise too. Where no arm has two seeds
there is none to take, and an interval holds documents and windows alone.
"""

# R replicates, D documents, W windows, K losses of a window (position ranges), S seeds

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

REPLICATES = 2000
LEVEL = 0.95


def ends(samples_R: ArrayLike) -> Floats:
    """Return the two ends of the interval of replicates, along their first axis."""
    tail = (1 - LEVEL) / 2
    return np.asarray(np.quantile(np.asarray(samples_R, dtype=np.float64), [tail, 1 - tail], axis=0))


@dataclass(frozen=True)
class Interval:
    """A percentile interval of confidence `LEVEL`."""

    low: float
    high: float

    @classmethod
    def of(cls, samples_R: ArrayLike) -> Interval:
        """Return the interval of replicates."""
        low, high = ends(samples_R)
        return cls(float(low), float(high))

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __add__(self, shift: float) -> Interval:
        return Interval(self.low + shift, self.high + shift)


@dataclass(frozen=True)
class SeedNoise:
    """How much the loss of one arm changes with the seed, pooled over the arms that have several.

    Attributes:
        sd: standard deviation between seeds, in nats: `s**2 = sum((loss - mean of its arm)**2) / freedom`.
        freedom: degrees of freedom, the sum over arms of their seeds less one.
    """

    sd: float
    freedom: int

    @classmethod
    def of(cls, arms: Iterable[Sequence[float]]) -> SeedNoise | None:
        """Estimate the noise from the losses of each arm's seeds; None where no arm has two."""
        by_arm = [np.asarray(losses, dtype=np.float64) for losses in arms]
        freedom = sum(len(losses) - 1 for losses in by_arm)
        if not freedom:
            return None
        squares = sum(float(((losses - losses.mean()) ** 2).sum()) for losses in by_arm)
        return cls(float(np.sqrt(squares / freedom)), freedom)

    def smallest_difference(self, seeds: int) -> float:
        """Return the least difference, in nats, that `LEVEL` confidence tells from the luck of `seeds` seeds an arm.

        `t * s * sqrt(2 / seeds)`, t the two-sided quantile of Student's t with `freedom` degrees of freedom. It holds
        nothing of the noise between documents.
        """
        return float(student_quantile(self.freedom) * self.sd * np.sqrt(2 / seeds))

    def draw(self, seeds: int) -> Floats:
        """Draw `[R]` deviations, in nats, of the difference of two arms with `seeds` seeds each."""
        deviation_R = np.random.default_rng(seeds).standard_t(self.freedom, REPLICATES)
        return np.asarray(deviation_R * self.sd * np.sqrt(2 / seeds))


@dataclass(frozen=True)
class Difference:
    """Loss of one arm minus that of another, both measured on the same windows.

    Attributes:
        mean: over seeds and windows, in nats.
        interval: None for a single window without a known noise of seeds.
        per_seed: the difference of every seed that both arms have.
        noise: that of seeds, if the interval holds it.
    """

    mean: float
    interval: Interval | None
    per_seed: tuple[float, ...]
    noise: SeedNoise | None = None

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and 0.0 not in self.interval


def paired_difference(
    first_SW: ArrayLike, second_SW: ArrayLike, document_W: ArrayLike, noise: SeedNoise | None = None
) -> Difference:
    """Return how much larger the first arm's loss is than the second's.

    Args:
        first_SW, second_SW: window losses in nats of the seeds that both arms have, in the same order; NaN where a
            window lacks this loss.
        document_W: a number per window, equal for windows of one document.
        noise: of seeds; None leaves it out of the interval.
    """
    difference_SW = np.asarray(first_SW, dtype=np.float64) - np.asarray(second_SW, dtype=np.float64)
    seeds = len(difference_SW)
    measured_W = ~np.isnan(difference_SW).any(axis=0)
    difference_SW, document_W = difference_SW[:, measured_W], np.asarray(document_W)[measured_W]
    mean_R = widened(window_shares(document_W) @ difference_SW.mean(axis=0), difference_SW.mean(), document_W)
    if noise is not None:
        mean_R = mean_R + noise.draw(seeds)
    return Difference(
        mean=float(difference_SW.mean()),
        interval=Interval.of(mean_R) if len(document_W) > 1 or noise is not None else None,
        per_seed=tuple(float(value) for value in difference_SW.mean(axis=1)),
        noise=noise,
    )


def mean_interval(total_W: ArrayLike, count_W: ArrayLike, document_W: ArrayLike) -> Interval | None:
    """Return the interval of `sum(total) / sum(count)`; None below two windows that have a count.

    Args:
        total_W: sum of the losses of a window's positions, in nats.
        count_W: how many positions of it carry loss.
        document_W: a number per window, equal for windows of one document.
    """
    total_W, count_W = np.asarray(total_W, dtype=np.float64), np.asarray(count_W, dtype=np.float64)
    some_W = count_W > 0
    if some_W.sum() < 2:
        return None
    total_W, count_W, document_W = total_W[some_W], count_W[some_W], np.asarray(document_W)[some_W]
    share_RW = window_shares(document_W)
    return Interval.of(widened((share_RW @ total_W) / (share_RW @ count_W), total_W.sum() / count_W.sum(), document_W))


def window_shares(document_W: ArrayLike) -> Floats:
    """Return `[R, W]`, what share of a replicate each window makes up; rows sum to one.

    The same documents get the same draws.
    """
    _, number_W = np.unique(np.asarray(document_W), return_inverse=True)
    return _shares(tuple(number_W.tolist()), REPLICATES)


def widened(drawn_R: Floats, measured: float | Floats, document_W: ArrayLike) -> Floats:
    """Return what draws of few documents have, `[R, ...]`, as far from what was measured as many would lie from it.

    The variance of D draws among D documents is `(D - 1) / D` of what it should be, and is itself known with D - 1
    degrees of freedom: the distance is multiplied by `t * sqrt(D / (D - 1)) / z`, t and z the two-sided quantiles of
    Student's t and of the normal distribution. A single document says nothing of others, and stays as it is.
    """
    freedom = len(np.unique(np.asarray(document_W))) - 1
    if freedom == 0:
        return drawn_R
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
    factor = student_quantile(freedom) * np.sqrt((freedom + 1) / freedom) / normal
    return np.asarray(measured + factor * (drawn_R - measured))


def student_quantile(freedom: int) -> float:
    """Return the t that `LEVEL` of Student's distribution with `freedom` degrees of freedom lies within.

    With `t = sqrt(freedom) * tan(angle)` the density over the angle is `cos(angle)**(freedom - 1)`.
    """
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(LEVEL, mass / mass[-1], angle)))


@lru_cache(maxsize=16)
def _shares(number_W: tuple[int, ...], replicates: int) -> Floats:
    rng = np.random.default_rng(0)
    document_W = np.asarray(number_W)
    documents = int(document_W.max()) + 1
    count_RD = rng.multinomial(documents, np.full(documents, 1 / documents), size=replicates)
    drawn_RW = np.empty((replicates, len(document_W)))
    for document in range(documents):
        own = np.flatnonzero(document_W == document)
        drawn_RW[:, own] = rng.multinomial(count_RD[:, document] * len(own), np.full(len(own), 1 / len(own)))
    shares_RW: Floats = drawn_RW / drawn_RW.sum(axis=1, keepdims=True)
    shares_RW.setflags(write=False)  # all who ask for these documents get this array
    return shares_RW
