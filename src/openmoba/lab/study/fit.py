"""Power laws `L = a * C^b` through the end points of runs, with bootstrap intervals over runs and validation windows.

Every run is measured on the same windows, so one draw of `openmoba.lab.measure.resample` serves all
runs of a replicate.
"""

# R bootstrap replicates, N runs, A arms, W validation windows, P points of a grid

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from openmoba.lab.measure.resample import REPLICATES, Floats, Interval, ends, widened, window_shares

HUBER_DELTA = 1e-3  # in log loss, as in Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3)
REWEIGHTINGS, SETTLED = 200, 1e-9  # steps of the Huber fit, and the change of a coefficient that ends them
LEAST_SPAN = 0.05  # of the runs' log compute; runs of one size differ by less, in measured seconds
HALVINGS = 100  # of the bracket around a slope, more than a double resolves


@dataclass(frozen=True)
class PowerLaw:
    """`L(C) = a * C^b`: loss in nats, compute in the unit of the axis (PFLOP/s-days or seconds)."""

    a: float
    b: float

    def __call__(self, compute: ArrayLike) -> Floats:
        return np.asarray(self.a * np.asarray(compute, dtype=np.float64) ** self.b)


@dataclass(frozen=True)
class Fit:
    """A fitted law with its uncertainty.

    Attributes:
        law: the fit to the observed losses.
        a, b: intervals of the two coefficients.
        compute, loss: [N] the points fitted.
        residual: [N] `log(loss) - log(law(compute))`; 0.01 is one percent of the loss.
        replicates: [R, 2] `(log a, b)` of every bootstrap replicate.
    """

    law: PowerLaw
    a: Interval
    b: Interval
    compute: Floats
    loss: Floats
    residual: Floats
    replicates: Floats

    def ratio(self, other: Fit, compute_P: ArrayLike) -> tuple[Floats, Floats]:
        """Return the ends, each [P], of the interval of this law over `other`, which `fit_arms` fitted with it."""
        line_R2 = self.replicates - other.replicates
        log_ratio_RP = line_R2[:, :1] + line_R2[:, 1:] * np.log(compute_P)[None]
        low_P, high_P = np.exp(ends(log_ratio_RP))
        return low_P, high_P


def fit_power_law(compute: ArrayLike, loss: ArrayLike) -> PowerLaw:
    """Return the law with the least Huber loss of the log residuals.

    Args:
        compute: [N] positive, at least two different values.
        loss: [N] positive, in nats.

    Raises:
        ValueError: fewer than two different amounts of compute, or a value that has no logarithm.
    """
    log_compute_N, log_loss_N = _logarithms(compute, loss)
    log_a, b = _huber_lines(log_compute_N, log_loss_N[None], np.ones((1, len(log_loss_N))))[0]
    return PowerLaw(float(np.exp(log_a)), float(b))


def fit_runs(compute: ArrayLike, windows: ArrayLike, documents: ArrayLike) -> Fit:
    """Fit a law as `fit_power_law` does, with intervals from a bootstrap over runs and validation windows.

    Args:
        compute: [N] compute of every run.
        windows: [N, W] every run's loss on every validation window.
        documents: [W] a number per window, equal for windows of one document.

    A replicate draws N runs and the windows with replacement; a draw of runs that have all about the same compute
    determines no line and is drawn again.
    """
    return fit_arms([compute], [windows], documents)[0]


def fit_arms(compute: Sequence[ArrayLike], windows: Sequence[ArrayLike], documents: ArrayLike) -> list[Fit]:
    """Fit the laws of several arms that share every draw, so that their replicates are paired.

    Args:
        compute, windows: [A][N] and [A][N, W], as in `fit_runs`; the n-th runs of all arms are partners, of the same
            size and seed.
    """
    compute_AN, windows_ANW = (np.asarray(values, dtype=np.float64) for values in (compute, windows))
    laws = [fit_power_law(*points) for points in zip(compute_AN, windows_ANW.mean(axis=2), strict=True)]
    share_RW, count_RN = window_shares(documents), _draw_runs(np.log(compute_AN))
    fits = []
    for law, compute_N, windows_NW in zip(laws, compute_AN, windows_ANW, strict=True):
        loss_N = windows_NW.mean(axis=1)
        drawn_RN = widened(np.log(share_RW @ windows_NW.T), np.log(loss_N), documents)
        lines_R2 = _huber_lines(np.log(compute_N), drawn_RN, count_RN)
        bounds = Interval.of(np.exp(lines_R2[:, 0])), Interval.of(lines_R2[:, 1])
        fits.append(Fit(law, *bounds, compute_N, loss_N, np.log(loss_N / law(compute_N)), lines_R2))
    return fits


def _logarithms(compute: ArrayLike, loss: ArrayLike) -> tuple[Floats, Floats]:
    compute_N, loss_N = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    for name, values_N in (("compute", compute_N), ("loss", loss_N)):
        if not (np.isfinite(values_N).all() and (values_N > 0).all()):
            raise ValueError(f"a power law needs positive, finite {name}, got {values_N.tolist()}")
    if len(np.unique(compute_N)) < 2:
        raise ValueError(
            f"a power law needs at least two different amounts of compute, got {compute_N.tolist()}; "
            "add another model size or token budget"
        )
    return np.log(compute_N), np.log(loss_N)


def _draw_runs(log_compute_AN: Floats) -> Floats:
    """Draw how often each run counts, [R, N]; in every arm a row spans `LEAST_SPAN` of what its runs span."""
    rng = np.random.default_rng(0)
    runs = log_compute_AN.shape[1]
    least_A = LEAST_SPAN * np.ptp(log_compute_AN, axis=1)
    count_RN = np.zeros((REPLICATES, runs))
    pending = np.arange(REPLICATES)
    while len(pending):
        count_RN[pending] = rng.multinomial(runs, np.full(runs, 1 / runs), size=len(pending))
        drawn_R1N = count_RN[pending][:, None] > 0
        highest_RA = np.where(drawn_R1N, log_compute_AN, -np.inf).max(axis=2)
        lowest_RA = np.where(drawn_R1N, log_compute_AN, np.inf).min(axis=2)
        pending = pending[(highest_RA - lowest_RA < least_A).any(axis=1)]
    return count_RN


def _huber_lines(x_N: Floats, y_RN: Floats, count_RN: Floats) -> Floats:
    """Fit lines of the least Huber loss: intercept and slope, [R, 2].

    Reweighted least squares settle most replicates within a hundred steps, but crawl where runs differ very little
    in compute; those that have not settled are bisected.
    """
    centre = x_N.mean()
    x_N = x_N - centre
    line_R2 = _weighted_lines(x_N, y_RN, count_RN)
    pending = np.arange(len(y_RN))
    for _ in range(REWEIGHTINGS):
        before_P2, y_PN, count_PN = line_R2[pending], y_RN[pending], count_RN[pending]
        residual_PN = y_PN - before_P2[:, :1] - before_P2[:, 1:] * x_N
        weight_PN = count_PN * HUBER_DELTA / np.maximum(np.abs(residual_PN), HUBER_DELTA)
        line_R2[pending] = _weighted_lines(x_N, y_PN, weight_PN)
        pending = pending[np.abs(line_R2[pending] - before_P2).max(axis=1) >= SETTLED]
        if not len(pending):
            break
    line_R2[pending] = _bisected_lines(x_N, y_RN[pending], count_RN[pending])
    line_R2[:, 0] -= line_R2[:, 1] * centre
    return line_R2


def _bisected_lines(x_N: Floats, y_RN: Floats, count_RN: Floats) -> Floats:
    """Fit lines of the least Huber loss, to rounding: intercept and slope, [R, 2].

    The least loss at a given slope is convex in the slope, so the sign of its derivative says on which side of the
    slope the minimum lies. In units of the threshold, residuals count in full up to 1.
    """
    y_RN = y_RN / HUBER_DELTA
    steepest_R = (np.ptp(y_RN, axis=1) + 2) / np.diff(np.unique(x_N)).min()
    low_R, high_R = -steepest_R, steepest_R
    for _ in range(HALVINGS):
        slope_R = (low_R + high_R) / 2
        rest_RN = y_RN - slope_R[:, None] * x_N
        pull_RN = count_RN * np.clip(rest_RN - _intercepts(rest_RN, count_RN)[:, None], -1, 1)
        steeper_R = pull_RN @ x_N > 0
        low_R, high_R = np.where(steeper_R, slope_R, low_R), np.where(steeper_R, high_R, slope_R)
    slope_R = (low_R + high_R) / 2
    intercept_R = _intercepts(y_RN - slope_R[:, None] * x_N, count_RN)
    return np.stack([intercept_R, slope_R], axis=1) * HUBER_DELTA


def _intercepts(rest_RN: Floats, count_RN: Floats) -> Floats:
    """Return the values of least Huber loss with threshold 1 from `rest_RN`, [R].

    The derivative of the loss is linear between the knots `rest - 1` and `rest + 1`, and changes sign once, after the
    first of them.
    """
    knot_RK = np.sort(np.concatenate([rest_RN - 1, rest_RN + 1], axis=1), axis=1)
    pull_RK = np.einsum("rn,rkn->rk", count_RN, np.clip(rest_RN[:, None] - knot_RK[:, :, None], -1, 1))
    row = np.arange(len(rest_RN))
    after = (pull_RK <= 0).argmax(axis=1)
    knot_R, pull_R = knot_RK[row, after - 1], pull_RK[row, after - 1]
    next_R, next_pull_R = knot_RK[row, after], pull_RK[row, after]
    return np.asarray(knot_R + (next_R - knot_R) * pull_R / (pull_R - next_pull_R))


def _weighted_lines(x_N: Floats, y_RN: Floats, weight_RN: Floats) -> Floats:
    total_R = weight_RN.sum(axis=1)
    x_mean_R = weight_RN @ x_N / total_R
    y_mean_R = (weight_RN * y_RN).sum(axis=1) / total_R
    x_RN = x_N - x_mean_R[:, None]
    slope_R = (weight_RN * x_RN * y_RN).sum(axis=1) / (weight_RN * x_RN**2).sum(axis=1)
    return np.stack([y_mean_R - slope_R * x_mean_R, slope_R], axis=1)
