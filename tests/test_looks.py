"""What is drawn in which colour: the same thing alike in every figure, others apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from openmoba.lab.study.groups import by
from openmoba.lab.study.looks import arm_looks, by_parameters, size_looks
from openmoba.lab.study.outcomes import Outcome
from openmoba.lab.study.recipe import Recipe, read_recipe
from openmoba.records.figures import BLUE, DENSE, RED, setting_looks

RECIPES = Path(__file__).parent.parent / "recipes"
PARAMETERS = {"2m": 2, "5m": 5, "9m": 9, "14m": 14, "15m": 15}


def runs_of(recipe: Recipe, stage: str) -> list[Outcome]:
    """Outcomes of a stage's runs with nothing but their plan and their size."""
    return [
        Outcome(run, run.config(Path()), {"params": {"non_embedding": PARAMETERS.get(run.size, 99)}}, [], {})
        for run in recipe.runs
        if run.stage.name == stage
    ]


@pytest.fixture
def candidates() -> list[Outcome]:
    return runs_of(read_recipe(RECIPES / "candidates.toml"), "candidates")


def test_an_arm_looks_the_same_whatever_else_is_drawn(candidates: list[Outcome]) -> None:
    looks = arm_looks(candidates)
    chart_a = runs_of(read_recipe(RECIPES / "chart-a.toml"), "hybrids")
    chart_b = runs_of(read_recipe(RECIPES / "chart-b.toml"), "pretrain")
    assert looks["Full attention"] == DENSE
    assert looks["MoBA"].colour == BLUE
    for other in (arm_looks(chart_a), arm_looks(chart_b), arm_looks(candidates[::-1])):
        alone = {"Full attention", "MoBA", "full-keys", "last-1", "last-3", "last-2-keys", "fine"}
        assert {name: look for name, look in other.items() if name in alone} == {
            name: looks[name] for name in alone & other.keys()
        }
    assert len(alone & arm_looks(chart_b).keys()) == 4
    assert len({look.colour for look in arm_looks(chart_a).values()}) == 4, "last-1, last-3, last-5, last-10"


@pytest.mark.parametrize("name", ["candidates", "granularity", "rotation"])
def test_arms_differ_in_colour_and_in_marker(name: str) -> None:
    looks = arm_looks(runs_of(read_recipe(RECIPES / "candidates.toml"), name)).values()
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(looks)


def test_sizes_are_coloured_by_their_parameters_whatever_their_order() -> None:
    kernel = runs_of(read_recipe(RECIPES / "context.toml"), "context")
    novels = runs_of(read_recipe(RECIPES / "context-novels.toml"), "context")
    assert list(by("size", kernel)) == list(by("size", novels))[::-1] == ["5m", "9m"]
    assert size_looks(kernel) == size_looks(novels)
    assert list(by_parameters(novels)) == ["5m", "9m"]
    assert len({look.colour for look in size_looks(kernel).values()}) == 2


def test_settings_look_the_same_in_every_benchmark() -> None:
    alone, beside = setting_looks([(512, 3)]), setting_looks([(256, 4), (128, 8), (512, 3), (128, 9)])
    assert alone[512, 3] == beside[512, 3]
    assert beside[128, 8].colour == beside[128, 9].colour == BLUE
    assert beside[128, 8].line != beside[128, 9].line
    assert RED not in {look.colour for look in beside.values()}
    assert setting_looks([(500, 3)])[500, 3] == alone[512, 3]
