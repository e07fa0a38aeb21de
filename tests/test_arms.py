"""Arms: an arm knows its attention, its cost and its names, and a kind of arm is one entry."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from openmoba.config import MobaConfig
from openmoba.lab.arms import KINDS, ArmConfig, Kind, attention_cost
from openmoba.lab.config import DataConfig, ModelConfig, RunConfig, from_dict
from openmoba.lab.train.summary import plan_text
from openmoba.ops.cost import causal_pairs, moba_pairs, moba_scores

ARMS = [
    ArmConfig("full"),
    ArmConfig("full", key_conv=4),
    ArmConfig("moba", 8, 2),
    ArmConfig("hybrid", 8, 2, full_layers=(0, 2)),
    ArmConfig("time_hybrid", 8, 2, switch_at=0.6),
    ArmConfig("time_hybrid", 8, 2, switch_at=1.0),
    ArmConfig("hybrid", 8, 2, warm_start=0.4),
    ArmConfig("time_hybrid", 8, 2, switch_at=0.8, warm_start=0.2, key_conv=4),
]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.short)
def test_keys_are_counted_step_by_step(arm: ArmConfig) -> None:
    layers, length, steps = 3, 61, 5
    read = [attention_cost(arm.attention(step, steps), layers, length)[0] for step in range(steps)]
    share = sum(read) / (steps * layers * causal_pairs(length))
    assert arm.key_share(layers, length, steps) == pytest.approx(share, rel=1e-12)
    assert (share == 1) == (arm.name == "full")


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (ArmConfig("moba", 16, 3), "MoBA, blocks of 16, top-3: 53% of full attention's keys"),
        (ArmConfig("moba", 16, 8), "MoBA, blocks of 16, top-8: 100% of full attention's keys"),
        (ArmConfig("hybrid", 16, 3, full_layers=2), "2 of 2 layers full (0, 1): 100% of full attention's keys"),
        (ArmConfig("full"), "full attention\n"),
    ],
    ids=lambda value: value.short if isinstance(value, ArmConfig) else None,
)
def test_a_plan_says_how_sparse_an_arm_is(arm: ArmConfig, said: str) -> None:
    """By hand, in windows of 8 blocks: 8 * 136 keys of own blocks and 13 * 256 of past ones, of 128 * 129 / 2."""
    config = RunConfig(DataConfig(length=128), ModelConfig(size="nano"), arm)
    assert said in plan_text(config)


def test_attention_costs_what_its_layers_read() -> None:
    assert attention_cost(None, 3, 61) == (3 * causal_pairs(61), 0)
    pairs, scores = moba_pairs(61, 8, 2), moba_scores(61, 8, 2)
    assert attention_cost(MobaConfig(8, 2, (0, 2)), 3, 61) == (2 * causal_pairs(61) + pairs, scores)
    assert attention_cost(MobaConfig(8, 2, "all"), 3, 61) == attention_cost(None, 3, 61)


def test_names_of_arms() -> None:
    assert [arm.label("an-arm") for arm in ARMS] == ["an-arm"] * len(ARMS)
    names = ["Full attention", "Full attention + key convolution", "MoBA", "hybrid", "time_hybrid", "time_hybrid"]
    assert [arm.label(arm.name) for arm in ARMS[:6]] == names
    assert [arm.short for arm in ARMS] == [
        "full", "full key-conv 4", "moba 8/2", "hybrid 8/2 full 0,2", "time_hybrid 8/2", "time_hybrid 8/2",
        "hybrid 8/2 full 1 warm 0.4", "time_hybrid 8/2 warm 0.2 key-conv 4",
    ]  # fmt: skip
    assert [arm.describe(3, 5) for arm in ARMS[:5]] == [
        "full attention",
        "full attention, key convolution over 4 tokens",
        "MoBA, blocks of 8, top-2",
        "MoBA, blocks of 8, top-2, 2 of 3 layers full (0, 2)",
        "MoBA, blocks of 8, top-2, full attention from step 4 on",
    ]
    assert ARMS[6].describe(3, 5) == "MoBA, blocks of 8, top-2, 1 of 3 layers full (2), full attention up to step 2"
    assert ARMS[3].settings(None, 5) == "blocks of 8, top-2"


def test_a_warm_start_is_full_attention_first() -> None:
    moba, full = MobaConfig(8, 2, 0, 4), MobaConfig(8, 2, "all", 4)
    assert [ARMS[7].attention(step, 5) for step in range(5)] == [full, moba, moba, moba, full]
    assert [ARMS[6].attention(step, 5) for step in (0, 1, 2, 4)] == [
        None,
        None,
        MobaConfig(8, 2, 1),
        MobaConfig(8, 2, 1),
    ]
    assert ARMS[7].sparsest(5) == moba
    assert ARMS[1].sparsest(5) == MobaConfig(64, 3, "all", 4)
    late = ArmConfig("time_hybrid", 8, 2, switch_at=0.2, warm_start=0.6)
    assert [late.attention(step, 5) for step in range(5)] == [None] * 5
    with pytest.raises(ValueError, match=r"arm\.warm_start is a share of the steps in \[0, 1\), got 1"):
        ArmConfig("moba", warm_start=1)


def test_a_kind_of_arm_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other layer full at first, all of them at the end: no other place knows that there is such a kind."""
    with pytest.raises(ValueError, match=f"unknown arm 'zebra'; the arms are {', '.join(KINDS)}"):
        ArmConfig("zebra")
    zebra = Kind("zebra", lambda arm: (0, 2), lambda arm, steps: steps - 1, "Zebra")
    monkeypatch.setitem(KINDS, "zebra", zebra)
    arm = ArmConfig("zebra", 8, 2)
    assert [arm.attention(step, 5) for step in (3, 4)] == [MobaConfig(8, 2, (0, 2)), None]
    assert (arm.label("zebra"), arm.short) == ("Zebra", "zebra 8/2")
    assert arm.describe(4, 5) == "MoBA, blocks of 8, top-2, 2 of 4 layers full (0, 2), full attention from step 5 on"
    assert 0 < arm.key_share(4, 64, 5) < 1


def test_a_record_or_recipe_names_a_kind_that_there_is() -> None:
    with pytest.raises(ValueError, match=f"name must be {' or '.join(map(repr, KINDS))}, got 'zebra'"):
        from_dict(ArmConfig, {"name": "zebra"})


def test_every_kind_is_explained() -> None:
    """In the table of the laboratory's page, and in the help of `ArmConfig.name`."""
    page = (Path(__file__).parent.parent / "docs/laboratory.md").read_text()
    table = page.partition("| arm | attention |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(KINDS)
    of_name = inspect.getsource(ArmConfig).partition("name: KindName")[2].split('"""')[1]
    assert set(KINDS) <= set(re.findall(r"\w+", of_name))
