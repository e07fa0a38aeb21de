"""Training speeds of runs are compared where they say something, and where not, the reason stands there instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_study
from synthetic_study import CANDIDATES, silent, train

from openmoba.lab.study import settings
from openmoba.lab.study.answers.stage import details, in_short
from openmoba.lab.study.candidates import standing_table, standings
from openmoba.lab.study.compare import speeds_apart
from openmoba.lab.study.outcomes import Outcome, read_outcomes
from openmoba.lab.study.recipe import parse_recipe
from openmoba.lab.study.settings import settings_table
from openmoba.lab.study.studies import read_studies
from openmoba.lab.study.work import run_study

HOST = "one window a step without CUDA graphs, where the host may be what is timed"
ONE_WINDOW = CANDIDATES.replace("steps = 400", "steps = 400, batch_size = 1")

pytestmark = pytest.mark.usefixtures("few_replicates")


def finish(out: Path, text: str = CANDIDATES, changed: str = "*", **launched: Any) -> list[Outcome]:
    """Finish a study whose runs named `changed` were launched so, and read it."""
    recipe = parse_recipe(text, title="t")
    run_study(recipe, out, train, silent)
    (out / "recipe.toml").write_text(text)
    for path in out.glob(f"candidates/{changed}/result.json"):
        result = json.loads(path.read_text())
        result["hardware"]["gpus"] = launched.get("gpus", result["hardware"]["gpus"])
        path.write_text(json.dumps(result | {name: value for name, value in launched.items() if name != "gpus"}))
    return read_outcomes(recipe, out)


def table_of(runs: list[Outcome]) -> str:
    return "\n".join(standing_table(runs, standings(runs)))


@pytest.mark.parametrize(
    ("text", "launched", "said"),
    [
        (ONE_WINDOW, {"gpus": ["a card"], "compiled": True}, HOST),
        (ONE_WINDOW, {"gpus": ["a card"], "compiled": True, "graphed": False}, HOST),
        (CANDIDATES.replace("steps = 400", "steps = 400, micro_batch_size = 1"), {"gpus": ["a card"]}, HOST),
        (ONE_WINDOW, {"gpus": ["a card"], "compiled": True, "graphed": True}, None),
        (CANDIDATES, {"gpus": ["a card"], "compiled": True}, None),
        (ONE_WINDOW, {}, None),
    ],
)
def test_a_gpus_steps_of_one_window_are_compared_as_graphs_alone(
    text: str, launched: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    runs = finish(tmp_path, text, **launched)
    assert speeds_apart(runs) == said
    table = table_of(runs)
    assert ("tokens/s" in table) == (said is None)
    assert (f", since the runs are of {said}." in table) == (said is not None)


def test_one_run_that_was_launched_otherwise_has_no_speed(tmp_path: Path) -> None:
    """Neither in the table nor in a sentence nor on the chart; the others keep theirs."""
    runs = finish(tmp_path, changed="large-last-3-seed0", compiled=True)
    rows = {line.split(" | ")[0]: line for line in table_of(runs).splitlines()}
    assert rows["| last-3"].endswith("% |  |  |")
    assert rows["| last-1"].endswith(" | 50,000 | 1.00x |")
    why = "last-3, since the runs are of 2 ways to run layers (eager, compiled)."
    assert f"\nNot compared in training speed with full attention: {why}\n" in table_of(runs)
    costs = {found.runs[0].label: found.candidate.cost for found in standings(runs)}
    assert costs["last-1"].endswith("% of keys, 1.00x tokens/s")
    assert costs["last-3"].endswith("% of keys")
    short, *rest = (in_short(runs[0].run.stage, runs, ["6nd"]), *details(runs[0].run.stage, runs, ["6nd"]))
    assert "last-3" in short
    assert not any("times" in sentence for sentence in (short, *rest))
    page = settings_table(read_studies([tmp_path]), tmp_path)
    taken = {
        row.split(" | ")[2].partition(":")[0]: row.split(" | ")[7]
        for row in page.splitlines()
        if row.startswith("| 1,024")
    }
    assert taken["last-3"] == "-"
    assert taken["last-1"] == "1.00x"
    assert page.endswith(f"\n\nNot compared in training speed with full attention: {why}\n")


def test_settings_take_the_lowest_difference_of_models_of_about_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1.2 M and 1.1 M parameters; 1 M counts no more, and 2 M has no settings to choose from."""
    monkeypatch.setattr(settings, "BUDGETS", (1.0,))
    full = synthetic_study.LAWS["full"]
    for name, parameters, gain in (("big", 1_200_000, 0.99), ("near", 1_100_000, 0.98), ("far", 1_000_000, 0.97)):
        monkeypatch.setitem(synthetic_study.PARAMETERS, "large", parameters)
        monkeypatch.setitem(synthetic_study.LAWS, "hybrid", (full[0] * gain, full[1]))
        finish(tmp_path / name)
    monkeypatch.setitem(synthetic_study.PARAMETERS, "large", 2_000_000)
    alone = CANDIDATES.replace('arms = ["full", "moba", "fine", "last-1", "last-3"]', 'arms = ["full", "moba"]')
    finish(tmp_path / "alone", alone)

    def measured_with(*names: str) -> str:
        rows = settings_table(read_studies([tmp_path / name for name in names]), tmp_path).splitlines()
        return next(row.split(" | ")[-1] for row in rows if row.startswith("| 1,024 |"))

    for order in (("big", "near", "far", "alone"), ("alone", "far", "near", "big")):
        assert measured_with(*order).startswith("[1,100,000 parameters; ")
        assert "](near/report.md)" in measured_with(*order)
    assert "](big/report.md)" in measured_with("big", "far")
    assert "](alone/report.md)" in measured_with("alone")
