"""What a report and the page of results say of planted differences: fair references, noise, what is as good as full."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import synthetic_study
from synthetic_study import CANDIDATES, RECIPE, silent, train

from openmoba.lab.study import charts, results
from openmoba.lab.study.answers import answers
from openmoba.lab.study.candidates import standing_table, standings
from openmoba.lab.study.outcomes import of_stage, read_outcomes
from openmoba.lab.study.recipe import parse_recipe
from openmoba.lab.study.results import headlines, read_studies, settings
from openmoba.lab.study.words import inside
from openmoba.lab.study.work import run_study

KEYS = (
    '[arms]\nfull-keys = { name = "full", key_conv = 4 }\nkeys = { name = "moba", key_conv = 4 }\n'
    'last-keys = { name = "hybrid", full_layers = 3, key_conv = 4 }\n'
)


pytestmark = pytest.mark.usefixtures("few_replicates")


def said(out: Path, text: str, stage: str, axis: str = "6nd") -> list[str]:
    """The answers of a stage of a study made by the recipe `text`."""
    recipe = parse_recipe(text, title="t")
    run_study(recipe, out, train, silent)
    found = next(one for one in recipe.stages if one.name == stage)
    return answers(found, of_stage(found, read_outcomes(recipe, out)), axis)


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
    short, best, alike, good, level = said(tmp_path, CANDIDATES, "candidates")
    assert short.startswith("In short: last-3 (blocks of ")
    assert short.endswith(", and its trailing loss ends within noise of that of full attention.")
    assert best.startswith("large: the lowest trailing loss of 4 sparse candidates is that of last-3: ")
    assert "% of the keys read and 1.00 times the tokens per second (8 documents, 24 windows, 1 seed)." in best
    assert alike == "Not told apart from last-3: none of the others."
    fair = "full attention (for arms with key convolution: full attention that has it)"
    assert good.startswith(f"At most 0.5% above {fair} at the upper end of the interval: ")
    assert "last-1" not in good
    assert level == f"All but last-3 are resolved above {fair}."
    plant(monkeypatch, luck=0.0, hybrid=(full[0] * 0.98, full[1]))
    *_, alike, good, level = said(tmp_path / "better", CANDIDATES, "candidates")
    assert "at the upper end of the interval: last-3 (-" in good
    assert ", last-1 (-" in good
    assert f"2 are not resolved above {fair}, which does not make them equal; the one of these" in level


def test_candidates_that_do_not_differ_are_said_not_to_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, luck=0.004)
    text = CANDIDATES.replace('"last-1", "last-3"]', '"last-3", "again"]')
    text = text.replace("[arms]", '[arms]\nagain = { name = "hybrid", full_layers = 3, block_size = 32 }')
    alike = said(tmp_path, text, "candidates")[2]
    assert alike.startswith("Not told apart from ")
    assert ": again (+" in alike or ": last-3 (+" in alike


def test_an_arm_with_key_convolution_is_compared_with_full_attention_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the short list, by the laws, and in the table of settings; full attention with it has a law of its own."""
    plant(monkeypatch)
    text = CANDIDATES.replace('["full", "moba", "fine", ', '["full", "last-keys", "full-keys", "moba", ')
    text = text.replace("[arms]\n", KEYS)
    short, best, *_ = said(tmp_path / "list", text, "candidates")
    assert short.endswith(" that of full attention with the same key convolution.")
    assert re.search(
        r"that of last-keys: .* from full attention: \*\*.* from full-keys, full .* same key convolution: \*\*", best
    )
    laws = RECIPE.replace("[arms]\n", KEYS)
    laws = laws.replace('arms = ["full", "moba"]', 'arms = ["full", "moba", "keys", "full-keys"]')
    short, *sentences = said(tmp_path / "laws", laws, "pretrain")
    assert re.search(
        r": MoBA .* full attention, keys .* full attention, keys .* full-keys, full-keys .* full att", short
    )
    pairs = [re.search(r"loss of (\S+) lies .* from that of (.+?), by", sentence) for sentence in sentences]
    assert [pair and pair.groups() for pair in pairs] == [
        ("MoBA", "full attention"), ("keys", "full attention"), ("keys", "full-keys"), ("full-keys", "full attention"),
    ]  # fmt: skip
    write_recipe(tmp_path / "laws", laws)
    lines = results.experiments(read_studies([tmp_path / "laws"]), tmp_path).splitlines()
    for size in ("small", "large"):
        told = {line.split()[6]: line for line in lines if line.startswith(f"- {size}: the trailing loss of ")}
        compared = {arm: re.findall(r"\) from (.+?), (?:\*\*|within)", line) for arm, line in told.items()}
        assert compared == {
            "MoBA": ["full attention"],
            "keys": ["full attention", "full-keys", "MoBA"],
            "full-keys": ["full attention"],
        }
    write_recipe(tmp_path / "list", text)
    monkeypatch.setattr(results, "BUDGETS", (0.5,))
    table = settings(read_studies([tmp_path / "list"]), tmp_path)
    row = next(line for line in table.splitlines() if line.startswith("| 1,024 | 50% | last-keys: "))
    assert re.match(r"[+-]\d\.\d\d \[", row.split(" | ")[4]), "against full attention with its key convolution"


def test_an_arm_whose_fair_reference_has_no_run_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention without key convolution is no measure of what the choice of blocks costs an arm that has it."""
    full = synthetic_study.LAWS["full"]
    plant(monkeypatch, luck=0.0, hybrid=(full[0] * 0.9, full[1]))
    text = CANDIDATES.replace('"fine", "last-1", "last-3"]', '"last-keys", "last-3"]').replace("[arms]\n", KEYS)
    short, best, _, unfair, good, *rest = said(tmp_path, text, "candidates")
    assert re.search(r"ends \d+\.\d% below that of full attention without its key convolution\.$", short)
    assert "with the same key convolution" not in best
    assert unfair.startswith("last-keys: full attention with the same key convolution has no run yet")
    assert "interval: last-3 (-" in good
    assert not any("last-keys" in sentence for sentence in (good, *rest))
    write_recipe(tmp_path, text)
    monkeypatch.setattr(results, "BUDGETS", (0.5,))
    table = settings(read_studies([tmp_path]), tmp_path)
    row = next(line for line in table.splitlines() if line.startswith("| 1,024 | 50% | last-keys: "))
    assert row.split(" | ")[4] == "not known yet: it has no run"


def test_percentages_are_of_the_seeds_that_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in the list and in the table of settings, where full attention has more seeds."""
    plant(monkeypatch, luck=0.05)
    said(tmp_path, CANDIDATES, "candidates")
    write_recipe(tmp_path, CANDIDATES)
    monkeypatch.setattr(results, "BUDGETS", (0.5,))
    (study,) = read_studies([tmp_path])
    row = next(line for line in settings([study], tmp_path).splitlines() if line.startswith("| 1,024 | 50% | last-"))
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


def test_laws_are_said_to_be_extrapolated_where_no_compute_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    text = RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')]
    short, within = said(tmp_path, text, "pretrain")
    assert "(6nd) the trailing loss" in within
    share = float(re.search(r" MoBA lies \+([\d.]+)% ", within)[1])  # type: ignore[index]
    start = "In short, trailing losses at equal compute (6nd), the most that both have spent: "
    assert short == f"{start}MoBA {share:.1f}% above full attention (3 sizes, 8 documents, 24 windows, 2 seeds)."
    for path in tmp_path.glob("pretrain/*moba*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["compute"]["6nd"] *= 1000
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, beyond = said(tmp_path, text, "pretrain")
    assert "(6nd, beyond the runs of one of them, which begin at 5.69e-06 PFLOP/s-days)" in beyond


def test_hybrids_are_said_to_be_within_noise_of_full_attention_and_what_share_of_layers_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = synthetic_study.LAWS["full"]
    plant(monkeypatch, luck=0.002, hybrid=(full[0] + 0.045, full[1]))
    short, gap, one, *_, three, reported = said(tmp_path / "gap", RECIPE, "finetune")
    assert re.search(r": MoBA in every layer \d+\.\d% above full attention, with 1 of 16 layers full \d", short)
    assert short.endswith("with 3 of 16 layers full within noise of full attention (8 documents, 24 windows, 2 seeds).")
    assert gap.startswith("large: MoBA in every layer costs +")
    assert gap.endswith(": **resolved**.")
    assert one.startswith("With 1 of 16 layers full (6%; last-1): +")
    assert "% of the gap closed: **" in one
    assert three.endswith("% of the gap closed: **within noise**.")
    assert reported.startswith("The hybrids of the MoBA report have 1, 3, 5 and 10 full layers of 32, 3% to 31%")
    plant(monkeypatch, luck=0.002, moba=full)
    short, none, *hybrids, _ = said(tmp_path / "none", RECIPE, "finetune")
    assert "MoBA in every layer within noise of full attention, with" in short
    assert none.endswith("**within noise**.")
    assert not any("gap closed" in sentence for sentence in hybrids), "there is none to close"


def test_arms_beside_others_are_placed_between_full_attention_and_moba(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, luck=0.001, time_hybrid=(1.5, -0.1))
    text = CANDIDATES.replace("[arms]", '[arms]\nswitched = { name = "time_hybrid" }')
    text += '[[stages]]\nname = "switch"\nsizes = ["large"]\narms = ["switched"]\nbeside = "candidates"\n'
    (sentence,) = said(tmp_path, f'{text}beside_arms = ["full", "moba"]\n', "switch")
    assert sentence.startswith("large: the trailing loss of switched is +")
    assert " from full attention, **" in sentence
    assert " from MoBA, **" in sentence


def test_settings_name_what_is_not_told_apart_from_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, luck=0.004)
    text = CANDIDATES.replace('"last-1", "last-3"]', '"last-3", "again"]')
    text = text.replace("[arms]", '[arms]\nagain = { name = "hybrid", full_layers = 3, block_size = 32 }')
    said(tmp_path, text, "candidates")
    write_recipe(tmp_path, text)
    rows = settings(read_studies([tmp_path]), tmp_path).splitlines()
    assert "| not told apart |" in rows[0]
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
    assert shown.count("](done/figures/") == 2
    assert shown.count("](done/report.md)") == 2


def test_names_of_arms_inside_a_sentence() -> None:
    assert [inside(name) for name in ("Full attention", "MoBA", "last-2")] == ["full attention", "MoBA", "last-2"]
