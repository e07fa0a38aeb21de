"""What a report and the page of results say of planted differences: fair references, noise, what is as good as full."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import synthetic_study
from synthetic_study import CANDIDATES, RECIPE, silent, train

from openmoba.lab.config import RunConfig
from openmoba.lab.study import charts, results, settings
from openmoba.lab.study.answers.stage import details, in_short
from openmoba.lab.study.candidates import standing_table, standings
from openmoba.lab.study.compare import mean_loss
from openmoba.lab.study.fit import Fit
from openmoba.lab.study.groups import by, of_stage
from openmoba.lab.study.laws import comparable, fit
from openmoba.lab.study.outcomes import Outcome, read_outcomes
from openmoba.lab.study.recipe import Stage, parse_recipe
from openmoba.lab.study.report import write_report
from openmoba.lab.study.results import headlines
from openmoba.lab.study.settings import settings_table
from openmoba.lab.study.studies import read_studies
from openmoba.lab.study.words import inside, listed, place_before, spent
from openmoba.lab.study.work import run_study

KEYS = (
    '[arms]\nfull-keys = { name = "full", key_conv = 4 }\nkeys = { name = "moba", key_conv = 4 }\n'
    'last-keys = { name = "hybrid", full_layers = 3, key_conv = 4 }\n'
)


pytestmark = pytest.mark.usefixtures("few_replicates")


def said(out: Path, text: str, stage: str, *axes: str) -> list[str]:
    """The answer of a stage of a study made by the recipe `text`, and what stands behind it."""
    recipe = parse_recipe(text, title="t")
    run_study(recipe, out, train, silent)
    found = next(one for one in recipe.stages if one.name == stage)
    runs = of_stage(found, read_outcomes(recipe, out))
    return [in_short(found, runs, axes or ["6nd"]), *details(found, runs, axes or ["6nd"])]


def plant(monkeypatch: pytest.MonkeyPatch, luck: float = 0.0, **laws: tuple[float, float]) -> None:
    """Give arms these laws and seeds this luck."""
    monkeypatch.setattr(synthetic_study, "LUCK", luck)
    for name, law in laws.items():
        monkeypatch.setitem(synthetic_study.LAWS, name, law)


def test_a_short_list_names_the_best_what_is_not_told_apart_and_what_is_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hybrids begin as good as full attention and gain with every layer; MoBA is far above."""
    full = synthetic_study.LAWS["full"]
    plant(monkeypatch, luck=0.001, hybrid=(full[0] + 0.045, full[1]), moba=(1.8, full[1]))
    short, best, good, above = said(tmp_path, CANDIDATES, "candidates")
    assert short.startswith("In short, last-3 reads ")
    assert ", trains 1.0 times as fast, and its trailing loss ends within noise of that of full attention. Its" in short
    assert " setting: blocks of " in short
    assert short.endswith(". Measured with 1.2 M parameters, 8 documents, 24 windows, 1 seed.")
    assert best == (
        "1.2 M: last-3 has the lowest trailing loss of 4 sparse candidates. Not told apart from it: none of the others."
    )
    fair = "full attention (for arms with key convolution: full attention that has it)"
    assert good.startswith(f"At most 0.5% above {fair} at the upper end of the interval: ")
    assert "last-1" not in good
    assert set(above[:-1].split(": ")[1].split(", ")) == {"last-1", "MoBA", "fine"}
    plant(monkeypatch, luck=0.0, hybrid=(full[0] * 0.98, full[1]))
    *_, good, above, level = said(tmp_path / "better", CANDIDATES, "candidates")
    assert good.endswith(" at the upper end of the interval: last-3, last-1.")
    assert set(above[:-1].split(": ")[1].split(", ")) == {"MoBA", "fine"}
    assert level.startswith(
        "The other 2 are not resolved above it, which does not make them equal to it. Of these last-1"
    )


def test_candidates_that_do_not_differ_are_said_not_to_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, luck=0.004)
    text = CANDIDATES.replace('"last-1", "last-3"]', '"last-3", "again"]')
    text = text.replace("[arms]", '[arms]\nagain = { name = "hybrid", full_layers = 3, block_size = 32 }')
    alike = said(tmp_path, text, "candidates")[1]
    assert "Not told apart from it: again (+" in alike or "Not told apart from it: last-3 (+" in alike


def test_an_arm_with_key_convolution_is_compared_with_full_attention_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the short list, by the laws, and in the table of settings; full attention with it has a law of its own."""
    plant(monkeypatch)
    text = CANDIDATES.replace('["full", "moba", "fine", ', '["full", "last-keys", "full-keys", "moba", ')
    text = text.replace("[arms]\n", KEYS)
    short, *_ = said(tmp_path / "list", text, "candidates")
    assert " that of full attention with the same key convolution. Its setting: " in short
    laws = RECIPE.replace("[arms]\n", KEYS)
    laws = laws.replace('arms = ["full", "moba"]', 'arms = ["full", "moba", "keys", "full-keys"]')
    short, *sentences = said(tmp_path / "laws", laws, "pretrain")
    told = re.findall(r"\. (\S+) ends [^.]*\.?[^.]* (full attention|full-keys) with ", short)
    full = "full attention"
    assert told == [("MoBA", full), ("keys", full), ("keys", "full-keys"), ("full-keys", full)]
    pairs = [re.search(r"loss of (\S+) lies .* from that of (.+?): ", sentence) for sentence in sentences]
    assert [pair and pair.groups() for pair in pairs] == [
        ("MoBA", "full attention"), ("keys", "full attention"), ("keys", "full-keys"), ("full-keys", "full attention"),
    ]  # fmt: skip
    write_recipe(tmp_path / "laws", laws)
    lines = results.experiments(read_studies([tmp_path / "laws"]), tmp_path).splitlines()
    for size in ("200 K", "1.2 M"):
        rows = [line.split(" | ")[1:3] for line in lines if line.startswith(f"| {size} | ")]
        assert sorted(rows) == sorted(
            [["MoBA", "Full attention"], ["keys", "Full attention"], ["keys", "full-keys"], ["keys", "MoBA"],
             ["full-keys", "Full attention"], ["full-keys", "MoBA"]]
        )  # fmt: skip
    write_recipe(tmp_path / "list", text)
    monkeypatch.setattr(settings, "BUDGETS", (0.5,))
    table = settings_table(read_studies([tmp_path / "list"]), tmp_path)
    row = next(line for line in table.splitlines() if line.startswith("| 1,024 | 50% | last-keys: "))
    found = re.match(r"([+-]\d\.\d\d) \[([+-]\d\.\d\d), ([+-]\d\.\d\d)\]$", row.split(" | ")[4])
    assert found, "against full attention with its key convolution"
    share, low, high = map(float, found.groups())
    where = place_before(share / 100, resolved=low > 0 or high < 0)
    assert f" and {where} that of full attention with its key convolution; it trains " in table


def test_an_arm_whose_fair_reference_has_no_run_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention without key convolution is no measure of what the choice of blocks costs an arm that has it."""
    full = synthetic_study.LAWS["full"]
    plant(monkeypatch, luck=0.0, hybrid=(full[0] * 0.9, full[1]))
    text = CANDIDATES.replace('"fine", "last-1", "last-3"]', '"last-keys", "last-3"]').replace("[arms]\n", KEYS)
    short, _, unfair, good, *rest = said(tmp_path, text, "candidates")
    assert re.search(r"ends \d+\.\d% below that of full attention without its key convolution\. Its", short)
    assert unfair.startswith("last-keys: full attention with the same key convolution has no run yet")
    assert good.endswith(" interval: last-3.")
    assert not any("last-keys" in sentence for sentence in (good, *rest))
    write_recipe(tmp_path, text)
    monkeypatch.setattr(settings, "BUDGETS", (0.5,))
    table = settings_table(read_studies([tmp_path]), tmp_path)
    row = next(line for line in table.splitlines() if line.startswith("| 1,024 | 50% | last-keys: "))
    assert row.split(" | ")[4] == "not known yet: it has no run"


def test_percentages_are_of_the_seeds_that_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in the list and in the table of settings, where full attention has more seeds."""
    plant(monkeypatch, luck=0.05)
    said(tmp_path, CANDIDATES, "candidates")
    write_recipe(tmp_path, CANDIDATES)
    monkeypatch.setattr(settings, "BUDGETS", (0.5,))
    (study,) = read_studies([tmp_path])
    rows = settings_table([study], tmp_path).splitlines()
    row = next(line for line in rows if line.startswith("| 1,024 | 50% | last-"))
    arm = row.split(" | ")[2].partition(":")[0]
    found = next(one for one in standings(study.outcomes) if one.runs[0].label == arm).plain
    (full,) = (run for run in study.outcomes if run.run.name == "candidates/large-full-seed0")
    assert found.trailing is not None
    assert found.trailing_loss == full.loss("trailing")
    assert row.split(" | ")[3].startswith(f"{100 * found.trailing.mean / full.loss('trailing'):+.2f} [")


def test_seeds_of_different_speed_are_shown_from_slowest_to_fastest(tmp_path: Path) -> None:
    recipe = parse_recipe(CANDIDATES, title="t")
    run_study(recipe, tmp_path, train, silent)
    path = tmp_path / "candidates" / "large-moba-seed1" / "result.json"
    path.write_text(path.read_text().replace('"tokens_per_second": 50000.0', '"tokens_per_second": 80000.0'))
    outcomes = read_outcomes(recipe, tmp_path)
    table = "\n".join(standing_table(outcomes, standings(outcomes)))
    assert " | 50,000 to 80,000 | 1.20x |" in table
    assert " | 50,000 | 1.00x |" in table


def write_recipe(out: Path, text: str) -> None:
    (out / "recipe.toml").write_text(text)


def more_compute(study: Path, pattern: str, factor: float) -> None:
    """Let runs have spent so many times the compute by 6ND."""
    for path in study.glob(pattern):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["compute"]["6nd"] *= factor
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_arm_and_size(text: str, study: Path) -> dict[tuple[str, str], list[Outcome]]:
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in read_outcomes(parse_recipe(text, title="t"), study):
        found.setdefault((outcome.run.arm, outcome.run.size), []).append(outcome)
    return found


def test_laws_are_not_compared_where_no_compute_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the runs of one arm there is no ratio and no verdict; where they overlap there are both."""
    plant(monkeypatch)
    text = RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')]
    short, within = said(tmp_path, text, "pretrain")
    assert within.startswith(
        "At 1.37e-07 PFLOP/s-days by 6ND, the most that both have spent, the trailing loss of MoBA "
    )
    assert re.search(r"\(laws of 6 runs each, largest residual \d\.\d%; 8 documents, 24 windows, 2 seeds\)\.$", within)
    share = float(re.search(r" MoBA lies \+([\d.]+)% ", within)[1])  # type: ignore[index]
    ends = {name: mean_loss(runs, "trailing") for name, runs in by_arm_and_size(text, tmp_path).items()}
    assert all(ends["moba", size] > ends["full", size] for size in ("small", "medium"))
    assert short.startswith(
        "In short, trailing losses on the same tokens (8 documents, 24 windows, 2 seeds). MoBA ends "
        f"{ends['moba', 'large'] / ends['full', 'large'] - 1:.1%} above full attention with 1.2 M parameters, and "
        "above it with 200 K and 500 K. Its law "
    )
    assert f" Its law at the same compute: {share:.1f}% above by 6ND. The largest residual of these laws is " in short
    more_compute(tmp_path, "pretrain/*moba*/metrics.jsonl", 1000)
    short, beyond = said(tmp_path, text, "pretrain", "6nd")
    assert beyond == (
        "By 6ND there is no ratio: the runs of MoBA spent 5.69e-06 to 1.37e-04 PFLOP/s-days, those of full attention "
        "5.69e-09 to 1.37e-07, and no amount is common to both."
    )
    assert " Its law at the same compute: no compute in common by 6ND. " in short
    short, beyond, within = said(tmp_path, text, "pretrain", "6nd", "causal_exact")
    large = by_arm_and_size(text, tmp_path)
    full, moba = (large[arm, "large"][0].final["compute"]["causal_exact"] for arm in ("full", "moba"))
    assert f" Of full attention's cost the largest takes {moba / full:.0%} by causal-exact. Its law " in short
    assert ": no compute in common by 6ND and " in short
    assert "no ratio" in beyond
    assert "by causal-exact, the most that both have spent, the trailing loss of MoBA lies +" in within
    write_report(parse_recipe(text, title="t"), tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert len([line for line in report.splitlines() if "exponent minus" in line]) == 2, "by causal-exact alone"


FOUR = (
    RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')]
    .replace("[arms]", '2m = { model = { size = "2m" }, train = { steps = 800 } }\n[arms]')
    .replace('sizes = ["small", "medium", "large"]', 'sizes = ["small", "medium", "large", "2m"]')
)


@pytest.mark.parametrize("lacking", ["moba", "full"])
def test_chart_table_and_sentence_are_of_the_same_runs(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One arm lacks the smallest size, which in the other is far off its law: neither law is fitted through that."""
    plant(monkeypatch)
    monkeypatch.setitem(synthetic_study.PARAMETERS, "2m", 3_000_000)
    real = synthetic_study.train

    def odd(config: RunConfig, folder: Path, **rest: Any) -> dict[str, Any]:
        more = 1.0 if config.model.size == "small" else 0.0
        monkeypatch.setitem(synthetic_study.MORE, (config.train.learning_rate, config.train.seed), more)
        return real(config, folder, **rest)

    recipe = parse_recipe(FOUR, title="t")
    run_study(recipe, tmp_path, odd, silent)
    for path in tmp_path.glob(f"pretrain/small-{lacking}-seed*"):
        shutil.rmtree(path)
    drawn: list[dict[str, Fit]] = []
    chart = charts.figures.scaling_chart
    monkeypatch.setattr(charts, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])
    monkeypatch.setattr(
        charts.figures,
        "scaling_chart",
        lambda curves, laws, *args, **rest: drawn.append(laws) or chart(curves, laws, *args, **rest),
    )
    write_report(recipe, tmp_path, "6nd")
    laws = drawn[0]
    assert {name: len(law.loss) for name, law in laws.items()} == {"Full attention": 6, "MoBA": 6}
    stage, runs = recipe.stages[0], read_outcomes(recipe, tmp_path)
    sentence = details(stage, of_stage(stage, runs), ["6nd"])[0]
    compute = min(float(law.compute.max()) for law in laws.values())
    share = float(laws["MoBA"].law(compute) / laws["Full attention"].law(compute)) - 1
    assert f"the trailing loss of MoBA lies {share:+.2%} [" in sentence
    report = (tmp_path / "report.md").read_text()
    assert sentence in report
    assert f"| MoBA | trailing loss | {laws['MoBA'].law.a:#.4g} [" in report
    assert f"| Full attention | trailing loss | {laws['Full attention'].law.a:#.4g} [" in report


def test_an_arm_of_two_sizes_has_no_law_and_takes_none_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    text = RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')].replace(', "moba"]', ', "moba", "last-1"]')
    recipe = parse_recipe(text, title="t")
    run_study(recipe, tmp_path, train, silent)
    for path in tmp_path.glob("pretrain/small-last-1-seed*"):
        shutil.rmtree(path)
    runs = of_stage(recipe.stages[0], read_outcomes(recipe, tmp_path))
    assert set(by("arm", comparable(runs))) == {"full", "moba"}
    assert len(comparable(runs)) == 12
    assert fit(by("arm", runs)["last-1"], "trailing", "6nd") is None
    (sentence,) = details(recipe.stages[0], runs, ["6nd"])
    assert "last-1" not in sentence


def test_hybrids_are_said_to_be_within_noise_of_full_attention_and_what_share_of_layers_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict is that of the difference from full attention; the share of the gap has none."""
    full = synthetic_study.LAWS["full"]
    plant(monkeypatch, luck=0.002, hybrid=(full[0] + 0.045, full[1]))
    short, gap, one, *_, three, reported = said(tmp_path / "gap", RECIPE, "finetune")
    assert re.search(r" MoBA in every layer: \d+\.\d% above\. 1 of 16 layers full: \d+\.\d% above\. ", short)
    assert short.endswith(" 3 of 16 layers full: within noise.")
    assert "with 1.2 M parameters against full attention (8 documents, 24 windows, 2 seeds)" in short
    assert gap.startswith("1.2 M: MoBA in every layer costs +")
    assert gap.endswith(", **resolved** (8 documents, 24 windows, 2 seeds).")
    assert one.startswith("With 1 of 16 layers full (6%; last-1): +")
    assert re.search(r"from full attention, \*\*resolved\*\*\. This closes about \d\d% of MoBA's gap\.$", one)
    assert "from full attention, **within noise**. This closes " in three
    assert reported.startswith("The hybrids of the MoBA report have 1, 3, 5 and 10 full layers of 32, 3% to 31%")
    plant(monkeypatch, luck=0.002, hybrid=(full[0] * 0.9, full[1]))
    *_, three, _ = said(tmp_path / "below", RECIPE, "finetune")
    assert three.endswith("from full attention, **resolved**. This closes all of MoBA's gap.")
    plant(monkeypatch, luck=0.002, moba=full)
    short, none, *hybrids, _ = said(tmp_path / "none", RECIPE, "finetune")
    assert " MoBA in every layer: within noise. " in short
    assert ", **within noise** (" in none
    assert not any("gap" in sentence for sentence in hybrids), "there is none to close"


def test_arms_beside_others_are_placed_between_full_attention_and_moba(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, luck=0.001, time_hybrid=(1.5, -0.1))
    text = CANDIDATES.replace("[arms]", '[arms]\nswitched = { name = "time_hybrid" }')
    text += '[[stages]]\nname = "switch"\nsizes = ["large"]\narms = ["switched"]\nbeside = "candidates"\n'
    _, sentence = said(tmp_path, f'{text}beside_arms = ["full", "moba"]\n', "switch")
    assert sentence.startswith("1.2 M: the trailing loss of switched is +")
    assert " from full attention, **" in sentence
    assert " from MoBA, **" in sentence


def test_settings_name_what_is_not_told_apart_from_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, luck=0.004)
    text = CANDIDATES.replace('"last-1", "last-3"]', '"last-3", "again"]')
    text = text.replace("[arms]", '[arms]\nagain = { name = "hybrid", full_layers = 3, block_size = 32 }')
    said(tmp_path, text, "candidates")
    write_recipe(tmp_path, text)
    rows = settings_table(read_studies([tmp_path]), tmp_path).splitlines()
    assert any("| not told apart |" in row for row in rows)
    last = [row.split(" | ") for row in rows if row.startswith("| 1,024 |")][-1]
    assert {last[2].partition(":")[0], last[5]} == {"last-3", "again"}


def test_the_charts_on_the_first_screen_are_of_the_first_study_that_says_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study of which no law can be fitted yet leaves its place to the next."""
    monkeypatch.setattr(charts, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])
    for name in ("begun", "done"):
        recipe = parse_recipe(RECIPE.replace("Synthetic", name), title="t")
        part = recipe if name == "done" else recipe.chosen(["pretrain/small-*"])
        run_study(recipe, tmp_path / name, train, silent, part)
        for figure in ("pretrain-scaling-law", "finetune-large-layerwise-hybrid"):
            (tmp_path / name / "figures").mkdir(exist_ok=True)
            (tmp_path / name / "figures" / f"{figure}.png").touch()
    shown = headlines(read_studies([tmp_path / "begun", tmp_path / "done"]), tmp_path)
    assert "begun" not in shown
    assert shown.count('<img src="done/figures/') == 2
    assert shown.count("](done/report.md)") == 2


def test_names_of_arms_inside_a_sentence() -> None:
    assert [inside(name) for name in ("Full attention", "MoBA", "last-2")] == ["full attention", "MoBA", "last-2"]


def test_names_of_compute_and_of_several() -> None:
    assert spent("6nd", 1.01e-4) == "1.01e-04 PFLOP/s-days by 6ND"
    assert spent("accelerator_seconds", 1360.2) == "1,360 accelerator seconds"
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(("named", "arms"), [((), ["full", "moba", "fine"]), (("full", "fine"), ["full", "fine"])])
def test_a_stage_is_compared_with_the_arms_that_it_names(named: tuple[str, ...], arms: list[str]) -> None:
    first = Stage("first", ("small",), ("full", "moba", "fine", "last-1"))
    own = Stage("own", ("small",), ("last-1",), beside="first", beside_arms=named)
    runs: list[Any] = [
        SimpleNamespace(run=SimpleNamespace(stage=stage, size="small", arm=arm))
        for stage in (first, own)
        for arm in stage.arms
    ]
    assert [outcome.run.arm for outcome in of_stage(own, runs)] == [*arms, "last-1"]
