"""Which layers of a model keep full attention."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from openmoba import MobaConfig
from openmoba.config import count_full_layers, parse_full_layers
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import from_dict, to_dict


@pytest.mark.parametrize(
    ("said", "layers", "full"),
    [
        (0, 8, []),
        ("none", 8, []),
        ("spread:0", 8, []),
        (2, 8, [6, 7]),
        ("last:2", 8, [6, 7]),
        ("first:2", 8, [0, 1]),
        ((5, 0, 5), 8, [0, 5]),
        ("0,5", 8, [0, 5]),
        ("3", 8, [5, 6, 7]),
        ("spread:1", 8, [7]),
        ("spread:2", 8, [3, 7]),
        ("spread:3", 12, [3, 7, 11]),
        ("spread:5", 12, [1, 3, 6, 8, 11]),
        ("spread:3", 7, [1, 3, 6]),
        ("spread:7", 7, list(range(7))),
        ("first:7", 7, list(range(7))),
    ],
)
def test_full_layers_by_count_place_and_name(said: Any, layers: int, full: list[int]) -> None:
    settings = MobaConfig(4, 2, said)
    assert sorted(settings.full_layer_indices(layers)) == full
    assert count_full_layers(settings.full_layers) == len(full)
    again = MobaConfig.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert again.full_layer_indices(layers) == settings.full_layer_indices(layers)
    arm = ArmConfig("hybrid", 4, 2, full_layers=said)
    assert arm.attention(0, 10) == settings
    assert from_dict(ArmConfig, json.loads(json.dumps(to_dict(arm)))).attention(0, 10) == settings


@pytest.mark.parametrize("layers", range(1, 30))
def test_spread_layers_are_even_and_end_in_the_last(layers: int) -> None:
    for count in range(1, layers + 1):
        full = sorted(MobaConfig(4, 2, f"spread:{count}").full_layer_indices(layers))
        groups = [b - a for a, b in zip([-1, *full], full, strict=False)]
        assert len(full) == count
        assert full[-1] == layers - 1
        assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"block_size": 16}, "have no top_k; they take"),
        ({"block_size": 16, "top_k": 3, "fullayers": 1}, "have unknown fullayers; they take block_size and top_k"),
        ({"blocks": 16}, "have no block_size, top_k and unknown blocks; they take"),
    ],
)
def test_a_table_of_settings_that_is_none_says_what_is_wrong(table: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"MoBA settings {table} {said}")):
        MobaConfig.from_dict(table)


def test_one_meaning_has_one_form() -> None:
    assert parse_full_layers("last:3") == parse_full_layers("3") == parse_full_layers(3) == 3
    assert parse_full_layers("none") == parse_full_layers("first:0") == 0
    assert parse_full_layers("2,0") == parse_full_layers([2, 0, 0]) == (0, 2)
    assert to_dict(ArmConfig("hybrid", full_layers="last:3")) == to_dict(ArmConfig("hybrid", full_layers=3))


@pytest.mark.parametrize(
    "said", ["", "middle:2", "last", "last:", "last:-1", "spread:1.5", "0,,2", "-1", 1.5, True, None, (0, 1.0), (True,)]
)
def test_other_full_layers_are_refused(said: Any) -> None:
    with pytest.raises(ValueError, match=r"full_layers must be a count of last layers.*\"spread:COUNT\".*got "):
        MobaConfig(4, 2, said)


@pytest.mark.parametrize("outside", [-1, 8])
def test_indices_of_no_layer_are_refused(outside: int) -> None:
    with pytest.raises(ValueError, match=rf"full_layers \[{outside}\] are not layers of a model with layers 0\.\.7"):
        MobaConfig(4, 2, (0, outside, 7)).full_layer_indices(8)


@pytest.mark.parametrize("said", [9, "first:9", "spread:9", "spread:1000000000000", "first:1000000000000"])
def test_more_full_layers_than_layers_are_refused(said: Any) -> None:
    with pytest.raises(ValueError, match="exceeds the model's 8 layers; use full_layers=8 for full attention"):
        MobaConfig(4, 2, said).full_layer_indices(8)


def test_options_say_full_layers_in_every_form() -> None:
    import tyro

    for words, layers in ((["2"], 2), (["0", "3"], (0, 3)), (["spread:2"], "spread:2"), (["last:2"], 2)):
        assert tyro.cli(ArmConfig, args=["--full-layers", *words]).full_layers == layers
