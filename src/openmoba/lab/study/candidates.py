"""The candidates of a short list: how far each is from full attention, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from openmoba.lab.arms import FULL
from openmoba.lab.columns import counted
from openmoba.lab.measure.resample import LEVEL, Difference, Interval
from openmoba.lab.study.compare import difference, paired_loss, seed_noise, speeds_apart
from openmoba.lab.study.figures import Level
from openmoba.lab.study.groups import by, fair_full, of_kind, share_a_seed
from openmoba.lab.study.outcomes import Named, Outcome
from openmoba.lab.study.panels import Candidate
from openmoba.lab.study.words import bounds, in_percent
from openmoba.records.markdown import table

SAME_SPEED = 1.05
"""Fastest seed over slowest, up to which their mean is one speed."""


@dataclass(frozen=True)
class Against:
    """Paired differences of an arm from one of full attention, None without the loss; that one's name and losses."""

    name: str
    trailing: Difference | None
    lm: Difference | None
    trailing_loss: float
    lm_loss: float

    @classmethod
    def of(cls, runs: Sequence[Outcome], full: Sequence[Outcome], all_runs: Sequence[Outcome]) -> Against:
        """Compare `runs` with `full`, with the noise of seeds in `all_runs`."""
        kinds: tuple[Named, Named] = ("trailing", "lm")
        trailing, lm = (difference(runs, full, kind, seed_noise(all_runs, kind)) for kind in kinds)
        return cls(full[0].label, trailing, lm, *(paired_loss(full, runs, kind) for kind in kinds))


@dataclass(frozen=True)
class Standing:
    """Where a candidate stands.

    Attributes:
        runs: the seeds of the arm.
        plain: against full attention.
        own: against full attention with the same parameters of its own, for an arm that has some (key convolution).
        fair: the one of both that is against full attention which differs in nothing but the choice of blocks; None
            where that has no run.
        key_share: keys read in training over all layers, as a share of those that full attention reads.
        speedup: training speed, as a multiple of full attention's; None where the two do not compare.
    """

    runs: list[Outcome]
    plain: Against
    own: Against | None
    fair: Against | None
    key_share: float | None
    speedup: float | None

    @property
    def candidate(self) -> Candidate:
        """Its row of the chart."""
        share = [] if self.key_share is None else [f"{self.key_share:.1%} of keys"]
        speed = [] if self.speedup is None else [f"{self.speedup:.2f}x tokens/s"]
        own = None if self.own is None else _level(self.own.trailing, self.own.trailing_loss)
        trailing, lm = (
            _level(self.plain.trailing, self.plain.trailing_loss),
            _level(self.plain.lm, self.plain.lm_loss),
        )
        return Candidate(self.runs[0].label, trailing, lm, own, ", ".join([*share, *speed]))


def standings(runs: Sequence[Outcome]) -> list[Standing]:
    """Return every arm but full attention, that of the lowest trailing loss first; empty without full attention.

    Args:
        runs: finished runs of one stage and size, all with a trailing loss.
    """
    full = of_kind(runs, FULL)
    found = []
    for own in by("arm", runs).values():
        if full and own != full and share_a_seed(own, full):
            same = fair_full(own, runs)
            plain, against = Against.of(own, full, runs), None
            if same and same != full and share_a_seed(own, same):
                against = Against.of(own, same, runs)
            alike = own[0].config.arm.key_conv == full[0].config.arm.key_conv
            fair, speedup = plain if alike else against, times_as_fast(own, full)
            found.append(Standing(own, plain, against, fair, own[0].key_share(), speedup))
    return sorted(found, key=lambda standing: standing.plain.trailing.mean if standing.plain.trailing else 0.0)


def standing_table(runs: Sequence[Outcome], found: Sequence[Standing]) -> Iterator[str]:
    """Write the candidates as a Markdown table, and the smallest difference that can be seen."""
    with_own = any(standing.own for standing in found)
    with_speed = any(standing.speedup for standing in found)
    heads = ["arm", "seeds", "trailing, nats", "%", "LM, nats", "%"]
    heads += ["trailing, from full with the same keys", "%"] if with_own else []
    heads += ["keys read", *(["tokens/s", "of full's"] if with_speed else [])]
    rows = []
    for standing in found:
        cells = [standing.runs[0].label, str(len(standing.runs))]
        cells += [*_cells(standing.plain.trailing, standing.plain.trailing_loss)]
        cells += [*_cells(standing.plain.lm, standing.plain.lm_loss)]
        if with_own:
            own = standing.own
            cells += _cells(own.trailing, own.trailing_loss) if own else ["", ""]
        share = "" if standing.key_share is None else f"{standing.key_share:.1%}"
        cells.append(share)
        if with_speed:
            cells += ["", ""] if standing.speedup is None else [speeds(standing.runs), f"{standing.speedup:.2f}x"]
        rows.append(cells)
    yield from table(heads, rows)
    yield ""
    if unlike := speeds_not_compared((standing.runs, of_kind(runs, FULL)) for standing in found):
        yield f"{unlike}\n"
    yield _noise_sentence(runs, found[0].plain.trailing_loss)


def tokens_per_second(runs: Sequence[Outcome]) -> float:
    """Return the training speed of one arm, the mean over its seeds."""
    return sum(run.tokens_per_second for run in runs) / len(runs)


def times_as_fast(own: Sequence[Outcome], full: Sequence[Outcome]) -> float | None:
    """Return the training speed of an arm as a multiple of full attention's; None where the two do not compare."""
    return None if speeds_apart([*full, *own]) else tokens_per_second(own) / tokens_per_second(full)


def speeds_not_compared(pairs: Iterable[tuple[Sequence[Outcome], Sequence[Outcome]]]) -> str:
    """Say which arms' speeds do not compare with that of full attention, and why; "" if all do."""
    labels: dict[str, list[str]] = {}
    for own, full in pairs:
        if apart := speeds_apart([*full, *own]):
            labels.setdefault(apart, []).append(own[0].label)
    parts = [f"{', '.join(dict.fromkeys(names))}, since the runs are of {apart}" for apart, names in labels.items()]
    return f"Not compared in training speed with full attention: {'; '.join(parts)}." if parts else ""


def speeds(runs: Sequence[Outcome]) -> str:
    """Write the tokens per second of an arm's seeds: their mean, or slowest to fastest where they differ."""
    slowest, fastest = (end(run.tokens_per_second for run in runs) for end in (min, max))
    if fastest < SAME_SPEED * slowest:
        return f"{tokens_per_second(runs):,.0f}"
    return f"{slowest:,.0f} to {fastest:,.0f}"


def _noise_sentence(runs: Sequence[Outcome], loss: float) -> str:
    noise = seed_noise(runs, "trailing")
    if noise is None:
        return (
            "No arm has two seeds, so the luck of a seed is not known here, and no interval holds it: small "
            "differences may change sign with another seed."
        )
    several = [own[0].label for own in by("arm", runs).values() if len(own) > 1]
    smallest = noise.smallest_difference(1)
    return (
        f"The smallest difference in trailing loss that one seed of each arm lets one see is {smallest:.4f} nats "
        f"({smallest / loss:.2%}): t · s · √(2 / seeds), where s = {noise.sd:.4f} nats is the standard deviation "
        f"between seeds, pooled over {', '.join(several)}, and t the {LEVEL:.0%} quantile of Student's t with "
        f"{counted(noise.freedom, 'degree')} of freedom. All intervals hold this noise."
    )


def _cells(found: Difference | None, loss: float) -> list[str]:
    """Write a difference in nats and in percent of `loss`, each with its interval."""
    if found is None:
        return ["-", "-"]
    return [f"{found.mean:+.4f}{bounds(found.interval)}", in_percent(found, loss, sign="")]


def _level(found: Difference | None, loss: float) -> Level | None:
    if found is None:
        return None
    interval = found.interval and Interval(100 * found.interval.low / loss, 100 * found.interval.high / loss)
    return Level(100 * found.mean / loss, interval)
