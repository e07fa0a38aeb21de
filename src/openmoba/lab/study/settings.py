"""Which setting to take, by the length of windows and by how many keys it may read, from the runs of all studies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from openmoba.lab.arms import FULL
from openmoba.lab.measure.resample import Difference
from openmoba.lab.study.candidates import speeds_not_compared, times_as_fast
from openmoba.lab.study.charts import describe_arm
from openmoba.lab.study.compare import behind, difference, paired_loss, seed_noise
from openmoba.lab.study.groups import by, fair_full, of_kind
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.report import REPORT_FILE
from openmoba.lab.study.studies import Study, link
from openmoba.lab.study.words import in_percent, place_before
from openmoba.records.markdown import table

BUDGETS = (0.1, 0.2, 0.35, 1.0)
"""Shares of the keys that a setting may read."""
ONE_SIZE = 0.1
"""Share of the largest model's parameters that another may lack and count as one size with it."""
PARTS = (8, 4, 2, 1)
"""Of the windows' length, the lengths that a setting is chosen for."""


def settings_table(studies: Sequence[Study], page: Path) -> str:
    """Say which setting to take, by length and by how many keys it may read, and on what it rests, as Markdown.

    First those of the greatest length, in words, the lowest loss first; then a table. A row is the arm with the
    lowest difference from full attention, in percent, at the last position range of that length, among the arms of
    the largest models that read no more keys than the budget; beside it the others of its model whose difference from
    it lies within noise. Empty without an arm that could be compared.
    """
    heads = ("length", "keys read at most", "setting", "against full attention, %", "with its key convolution, %",
             "not told apart", "keys read", "training speed", "measured with")  # fmt: skip
    rows, taken = [], []
    last: list[_Setting] = []
    for groups in _largest_models(studies):
        length = groups[0][1][0].config.data.length
        for end in [length // part for part in PARTS]:
            found = list(_best([arm for study, runs in groups for arm in _arms_at(end, study, runs)]))
            rows += [[f"{end:,}", *_cells(budget, best, alike, page)] for budget, best, alike in found]
            taken += [(best.own, best.full) for _, best, _ in found]
            last = [best for _, best, _ in found] or last
    unlike = speeds_not_compared(taken)
    return "\n".join([*_in_words(last), *table(heads, rows), *(["", unlike] if unlike else []), ""]) if rows else ""


@dataclass(frozen=True)
class _Setting:
    """An arm at one length, beside full attention of the same model.

    Attributes:
        own, full: its runs and those of full attention.
        number: of the position range before that length.
        against: paired difference in nats; loss: of full attention, which that is a part of.
        key_share: keys read up to that length, as a share of those that full attention reads.
    """

    study: Study
    runs: list[Outcome]
    own: list[Outcome]
    full: list[Outcome]
    number: int
    against: Difference
    loss: float
    key_share: float

    @property
    def percent(self) -> float:
        return 100 * self.against.mean / self.loss

    @cached_property
    def fair(self) -> tuple[Difference | None, float]:
        """Difference from full attention with the arm's key convolution, and the latter's loss; None without one."""
        full = fair_full(self.own, self.runs)
        found = difference(self.own, full, self.number, seed_noise(self.runs, self.number))
        return found, 0.0 if found is None else paired_loss(full, self.own, self.number)


def _largest_models(studies: Sequence[Study]) -> list[list[tuple[Study, list[Outcome]]]]:
    """Find for each length the largest models that several settings were compared on, those with most arms first.

    Sizes within `ONE_SIZE` of the largest are one. Models of one setting alone count where there are no others.
    """
    found: dict[int, list[tuple[Study, list[Outcome]]]] = {}
    for study, stage in ((one, stage) for one in studies for stage in one.recipe.stages):
        for runs in by("size", study.runs(stage)).values():
            full = of_kind(runs, FULL)
            if full and full[0].config.arm.key_conv is None:
                found.setdefault(runs[0].config.data.length, []).append((study, runs))
    chosen = []
    for _, groups in sorted(found.items()):
        groups.sort(key=lambda group: -len(by("arm", group[1])))
        several = [group for group in groups if len(by("arm", group[1])) > 2] or groups
        least = max(_parameters(runs) for _, runs in several) * (1 - ONE_SIZE)
        chosen.append([group for group in several if _parameters(group[1]) >= least])
    return chosen


def _parameters(runs: Sequence[Outcome]) -> int:
    """Return the parameters of full attention's model, without embeddings."""
    return of_kind(runs, FULL)[0].parameters


def _arms_at(end: int, study: Study, runs: list[Outcome]) -> Iterator[_Setting]:
    """Yield the arms that are compared with full attention at the positions before `end`."""
    full, ends = of_kind(runs, FULL), [stop for _, stop in runs[0].ranges]
    if end not in ends:
        return
    number = ends.index(end)
    for own in by("arm", runs).values():
        against, share = difference(own, full, number, seed_noise(runs, number)), own[0].key_share(end)
        if own != full and against is not None and share is not None:
            yield _Setting(study, runs, own, full, number, against, paired_loss(full, own, number), share)


def _best(arms: Sequence[_Setting]) -> Iterator[tuple[float, _Setting, list[str]]]:
    """Yield the best arm within each budget, each arm once, with those of its model that are not told apart from it."""
    last = None
    for budget in BUDGETS:
        within = [arm for arm in arms if arm.key_share <= budget]
        best = min(within, key=lambda arm: arm.percent, default=None)
        if best is None or best is last:
            continue
        last, noise = best, seed_noise(best.runs, best.number)
        others = [arm.own for arm in within if arm.runs is best.runs and arm is not best]
        apart = [(own, difference(own, best.own, best.number, noise)) for own in others]
        yield budget, best, [own[0].label for own, found in apart if found is not None and not found.resolved]


def _in_words(settings: Sequence[_Setting]) -> list[str]:
    """Say in a list what each setting of one length costs and gains, the lowest loss first."""
    length = settings[0].own[0].ranges[settings[0].number][1]
    lines = [f"At {length:,} tokens, the lowest loss first:", ""]
    for best in sorted(settings, key=lambda best: best.percent):
        speedup = times_as_fast(best.own, best.full)
        where = place_before(best.percent / 100, best.against.resolved)
        fair, loss = best.fair
        beside = (
            f" and {place_before(fair.mean / loss, fair.resolved)} that of full attention with its key convolution"
            if fair
            else ""
        )
        trains = "" if speedup is None else f"; it trains {speedup:.1f} times as fast"
        lines.append(
            f"- **{best.own[0].label}** reads {best.key_share:.0%} of the keys; its loss at the last positions is "
            f"{where} full attention's{beside}{trains}."
        )
    return [*lines, ""]


def _cells(budget: float, best: _Setting, alike: Sequence[str], page: Path) -> list[str]:
    speedup, behind_it = times_as_fast(best.own, best.full), behind(best.own, best.number)
    parameters, report = best.own[0].parameters, link(best.study.folder / REPORT_FILE, page)
    return [
        f"{budget:.0%}", describe_arm(best.own[0]), in_percent(best.against, best.loss, sign=""),
        _in_percent_of_fair(best), ", ".join(alike), f"{best.key_share:.1%}",
        "-" if speedup is None else f"{speedup:.2f}x", f"[{parameters:,} parameters; {behind_it}]({report})",
    ]  # fmt: skip


def _in_percent_of_fair(best: _Setting) -> str:
    """Write the difference from full attention with the arm's key convolution; "" for an arm without."""
    arm, (found, loss) = best.own[0].config.arm, best.fair
    if found is None and arm.key_conv is not None and arm.kind is not FULL:
        return "not known yet: it has no run"
    return "" if found is None else in_percent(found, loss, sign="")
