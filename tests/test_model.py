"""Sizes of decoders, and entries of their configurations that are replaced."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from openmoba import MobaConfig, cli
from openmoba.lab.config import ModelConfig, RunConfig, from_dict, to_dict
from openmoba.lab.model import build
from openmoba.lab.model.build import SIZES, build_model, check_model, load_model
from openmoba.lab.study.recipe import parse_recipe
from openmoba.lab.study.work import run_study

MOBA = MobaConfig(8, 2)
THETA = "rope_parameters.rope_theta"


@pytest.mark.parametrize("name", [name for name in SIZES if name[0].isdigit() and not name.endswith("b")])
def test_names_of_sizes_say_their_parameters_and_heads(name: str) -> None:
    size = SIZES[name]
    millions, _, suffix = name.partition("m")
    assert round(size.matrices / 1e6) == pytest.approx(int(millions), abs=int(millions) // 100)
    width = size.hidden // size.heads
    assert size.hidden == width * size.heads
    assert width == (128 if suffix == "-d128" or int(millions) > 500 else 64)
    assert (size.kv_heads is not None) == (suffix == "-gqa")
    assert size.feed_forward % 64 == 0
    assert size.feed_forward / size.hidden == pytest.approx(8 / 3, rel=0.07)


def test_the_ladder_is_even_and_a_deep_size_is_near_its_middle() -> None:
    counts = [SIZES[name].matrices for name in ("2m", "5m", "9m", "17m", "32m")]
    steps = [b / a for a, b in pairwise(counts)]
    assert counts[0] / 1e6 == pytest.approx(2, rel=0.15)
    assert all(step == pytest.approx(2, rel=0.15) for step in steps)
    assert SIZES["15m"].layers == 12
    assert 14e6 <= SIZES["15m"].matrices <= 20e6


def test_sizes_are_of_the_models_that_they_build() -> None:
    for name in ("2m", "13m-gqa"):
        with torch.device("meta"):
            model = build_model(ModelConfig(size=name), 64, 64, 0)
        size, tables = SIZES[name], model.get_input_embeddings().weight.numel()
        norms = (2 * size.layers + 1) * size.hidden
        assert sum(p.numel() for p in model.parameters()) == size.matrices + norms + tables
        assert model.config.num_key_value_heads == (size.kv_heads or size.heads)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gptj", "xglm"])
def test_a_size_gives_the_width_of_the_feed_forward_whatever_a_family_calls_it(family: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(family, "2m"), 64, 64, 0)
    widths = {width for weight in model.parameters() if weight.ndim == 2 for width in weight.shape}
    assert SIZES["2m"].feed_forward in widths
    assert widths <= {64, 66, 192, 3 * 192, SIZES["2m"].feed_forward}  # words, positions, the model, queries to values


@pytest.mark.parametrize(
    ("own", "name", "value"), [("n_embd", "hidden_size", 96), ("n_head", "num_attention_heads", 4)]
)
def test_overrides_may_call_an_entry_as_the_family_does(own: str, name: str, value: int) -> None:
    """A size gives the same entries, which must not win over what was asked for."""
    for said in (own, name):
        with torch.device("meta"):
            model = build_model(ModelConfig("gpt2", "nano", {said: value}), 64, 64, 0)
        assert getattr(model.config, name) == value
    with pytest.raises(ValueError, match=f"{own} has two names and is set by both"):
        build_model(ModelConfig("gpt2", "nano", {own: value, name: value}), 64, 64, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_layer": 10**20}, "num_hidden_layers must be 1 to 10,000, got 10+"),
        ({"n_embd": -64}, "n_embd must be >= 1, got -64"),
    ],
)
def test_counts_are_checked_under_every_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig("gpt2", "nano", overrides), 64, 64, 0)


@pytest.mark.parametrize(
    ("family", "message"),
    [("bloom", "no width that model.size could set"), ("gpt_neo", "model.size does not fit a gpt_neo model, take ano")],
)
def test_a_family_that_a_size_does_not_fit_is_refused(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(family, "2m"), 64, 64, 0)


@pytest.mark.parametrize("family", ["phi3", "gemma", "olmo"])
def test_no_word_is_the_padding_of_a_family(family: str) -> None:
    """Phi-3's is 32000, behind a small table; those of others are among the first words, whose rows would stay zero."""
    table = build_model(ModelConfig(family, "nano"), 257, 64, 0).get_input_embeddings()
    assert table.padding_idx is None
    assert (table.weight != 0).any(-1).all()


def test_the_help_lists_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").replace(";", " ").replace(".\n", " ").split())
    text = " ".join(words)
    assert [name for name in SIZES if name not in words and f"{name}." not in text] == []


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_rotary_base_can_be_set(family: str) -> None:
    """And the rest of the table stays: the family's, or that of the model that is loaded."""
    read = from_dict(
        ModelConfig, {"family": family, "size": "nano", "overrides": {"rope_parameters": {"rope_theta": 1e6}}}
    )
    assert read == ModelConfig(family, "nano", {THETA: 1e6})
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(read)))) == read
    model = build_model(read, 64, 64, 0)
    assert model.config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}
    frequency = model.base_model.rotary_emb.inv_freq
    torch.testing.assert_close(frequency, 1e6 ** -(torch.arange(0, 32, 2) / 32))


def test_a_loaded_model_takes_the_entry_into_its_own_table(tmp_path: Path) -> None:
    scaled = {"rope_parameters.rope_type": "linear", "rope_parameters.factor": 2.0}
    build_model(ModelConfig(size="nano", overrides=scaled), 64, 64, 0).save_pretrained(tmp_path)
    model = load_model(tmp_path, {THETA: 5e5})
    assert model.config.rope_parameters == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    torch.testing.assert_close(model.base_model.rotary_emb.inv_freq, 5e5 ** -(torch.arange(0, 32, 2) / 32) / 2)
    with pytest.raises(ValueError, match=r"do not fit the model of .*Unrecognized keys.*rope_base"):
        load_model(tmp_path, {"rope_parameters.rope_base": 5e5})
    with pytest.raises(ValueError, match=r"do not fit the model of .*has no sliding_windows"):
        load_model(tmp_path, {"sliding_windows": None})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_parameters.rope_base": 1e6}, r"rope_base.* do not fit a qwen3 model.*Unrecognized keys"),
        ({"rope_parameters.rope_type": "linaer"}, r"do not fit a qwen3 model.*'linaer'"),
        ({"rope_parameters.rope_type": "linear"}, r"do not fit a qwen3 model.*Missing required keys.*factor"),
        ({"rope_parameters.factor": 2.0}, r"do not fit a qwen3 model.*Unrecognized keys.*factor"),
        ({THETA: -1.0}, r"rope_theta must be a number > 0, got -1\.0"),
        ({THETA: "1e6x"}, "rope_theta must be a number > 0, got '1e6x'"),
        ({THETA: float("nan")}, "rope_theta must be a number > 0, got nan"),
        ({"rope_parameters.partial_rotary_factor": 0.5}, r"qwen3 model rotates whole heads and ignores .*=0\.5"),
        ({"rope_parameter.rope_theta": 1e6}, "the configuration has no rope_parameter"),
        ({"hidden_size.width": 3}, r"hidden_size\.width leads into hidden_size, which is no table"),
        ({"rope_parameters": 3}, r"do not fit a qwen3 model.*rope_parameters"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be 1 to 10,000, got 0"),
        ({"num_hidden_layers": 10**20}, "num_hidden_layers must be 1 to 10,000, got 10+"),
        ({"num_attention_heads": 0}, "num_attention_heads must be >= 1, got 0"),
        ({"intermediate_size": -1}, r"do not fit a qwen3 model.*intermediate_size must be >= 1, got -1"),
        # Later releases of transformers than 5.17 say so themselves.
        ({"head_dim": 9}, "heads of width 9 cannot be rotated by pairs|requires an even rotary dimension"),
        ({"head_dim": 10**20}, r"head_dim.* do not fit a qwen3 model"),
        ({"hidden_act": "silo"}, r"do not fit a qwen3 model.*silo"),
        ({"pad_token_id": 10**20}, r"do not fit a qwen3 model.*num_embeddings"),
        ({"num_key_value_heads": 3}, "num_attention_heads=2 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_overrides_without_effect_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(ModelConfig("qwen3", "nano", overrides), 64, MOBA)


TWICE_ROTATED = {"rope_parameters.partial_rotary_factor": 2.0}


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("glm", TWICE_ROTATED, r"do not fit a glm model, correct or leave out the entry: The size of tensor a \(32\)"),
        ("mixtral", {"num_experts_per_tok": 20}, "do not fit a mixtral model.*: selected index k out of range"),
        ("qwen3", {"return_dict": False}, "do not fit a qwen3 model.*last_hidden_state"),
    ],
)
@pytest.mark.parametrize("attention", [None, MOBA])
def test_overrides_that_the_forward_pass_alone_refuses_are_refused_before_it(
    family: str, overrides: dict[str, Any], message: str, attention: MobaConfig | None
) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(ModelConfig(family, "nano", overrides), 64, attention)


@pytest.mark.parametrize(("family", "overrides"), [("opt", {"ffn_dim": 48}), ("mixtral", {"num_experts_per_tok": 1})])
def test_overrides_that_cannot_be_judged_without_data_are_not_refused(family: str, overrides: dict[str, Any]) -> None:
    check_model(ModelConfig(family, "nano", overrides), 64, MOBA)


def test_overrides_are_judged_without_memory_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_check_forward", None)
    check_model(ModelConfig("qwen3", "2.1b", {"hidden_size": 2048}), 64, MOBA)


def test_a_loaded_model_that_cannot_compute_with_its_overrides_is_refused(tmp_path: Path) -> None:
    build_model(ModelConfig("glm", "nano"), 64, 64, 0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit the model of .*: The size of tensor a \(32\)"):
        load_model(tmp_path, TWICE_ROTATED)


def test_an_entry_set_twice_is_refused() -> None:
    twice = {"overrides": {"rope_parameters": {"rope_theta": 1.0}, THETA: 2.0}}
    with pytest.raises(ValueError, match=r"overrides\.rope_parameters\.rope_theta is set twice"):
        from_dict(ModelConfig, twice, "model")


def test_a_wrong_model_is_refused_before_data_are_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, word in (
        (["--model.size", "huge"], "unknown model.size 'huge'"),
        (["--model.overrides", "rope_parameters.rope_base", "1e6"], "rope_base"),
        (["--arm.name", "hybrid", "--arm.full-layers", "9"], "full_layers=9 exceeds the model's 4 layers"),
    ):
        assert cli.main(["train", str(tmp_path / "run"), "--data.source", "no/such/file.txt", *options]) == 2
        assert word in capsys.readouterr().err


def test_a_study_checks_all_its_models_before_the_first_run(tmp_path: Path) -> None:
    recipe = parse_recipe(
        """
        [run]
        model = { overrides = { rope_parameters = { rope_theta = 1e6 } } }
        [sizes]
        good = { model = { size = "nano" } }
        bad = { model = { size = "micro", overrides = { rope_parameters = { rope_base = 2 } } } }
        [arms]
        moba = { name = "moba" }
        [[stages]]
        name = "one"
        sizes = ["good", "bad"]
        arms = ["moba"]
        """,
        title="study",
    )
    assert [run.config(tmp_path).model.overrides[THETA] for run in recipe.runs] == [1e6, 1e6]
    with pytest.raises(ValueError, match=r"run one/bad-moba-seed0: model\.overrides=.*rope_base"):
        run_study(recipe, tmp_path / "study", lambda *_, **__: pytest.fail("trained"), lambda _: None)  # type: ignore
    assert not (tmp_path / "study").exists()


def test_a_command_sets_nested_entries() -> None:
    import tyro

    options = tyro.cli(RunConfig, args=["--model.overrides", THETA, "1e6", "rope_parameters.rope_type", "default"])
    assert options.model.overrides == {THETA: 1e6, "rope_parameters.rope_type": "default"}
    assert dataclasses.replace(options.model, overrides={}) == ModelConfig()
