"""What is refused before a model is changed or written, what is not, and how saved models are loaded elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.export import Dim, export

transformers = pytest.importorskip("transformers")

from decoders import LAYERS, SIZES  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    GitConfig,
    GlmMoeDsaConfig,
    GptOssConfig,
    HrmTextConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure, convert  # noqa: E402
from openmoba.hf.attention import attention_forward  # noqa: E402

MOBA = MobaConfig(4, 2)
MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
}
FULL = {"layer_types": ["full_attention"] * LAYERS}

CANNOT_RUN = {
    "latent": (DeepseekV3Config, LATENT | {"num_key_value_heads": 6}, "keys of width 16 and values of width 8"),
    "narrow": (LlamaConfig, {"head_dim": 4}, "heads of width 4; MoBA computes widths 8 to 256"),
    "wide": (LlamaConfig, {"head_dim": 288}, "heads of width 288; MoBA computes widths 8 to 256"),
    "not causal": (BertConfig, {}, "BertSelfAttention that is not causal"),
    "soft-capped": (Gemma2Config, FULL, "soft-capped logits"),
    "sinks": (GptOssConfig, FULL | {"num_local_experts": 2}, "attention sinks"),
    "own mask": (DogeConfig, {}, "a mask of its own making"),
    "indexer": (
        GlmMoeDsaConfig,
        LATENT
        | FULL
        | {"v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "n_shared_experts": 1},
        "an indexer that chooses keys",
    ),
    "looped": (HrmTextConfig, {"H_cycles": 2, "L_cycles": 1}, r"attention layers that share a number \(layer_idx\)"),
    "own attention": (GitConfig, {}, "a GitSelfAttention that does not take its attention from transformers'"),
    "no attention": (LongcatFlashConfig, LATENT | {"num_layers": 1}, "no attention layers of a kind that MoBA knows"),
    "window": (MistralConfig, {"sliding_window": 0}, "sliding window of 0; load it with sliding_window=None"),
}


def build(kind: Any, **entries: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**(SIZES | entries))).eval()


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits


@pytest.mark.parametrize("case", CANNOT_RUN)
def test_what_cannot_run_is_refused_at_once(case: str, tmp_path: Path) -> None:
    kind, entries, message = CANNOT_RUN[case]
    model = build(kind, **entries)
    with pytest.raises(ValueError, match=message) as refusal:
        configure(model, MOBA)
    assert re.search("use a decoder whose layers|use another model|load it with", str(refusal.value)), "a way out"
    assert model.config.moba is None
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "full", tmp_path / "moba", MOBA)
    assert not (tmp_path / "moba").exists()


def test_what_is_no_model_and_no_settings(tmp_path: Path) -> None:
    model, table = build(LlamaConfig), MOBA.to_dict()
    for settings in (MOBA, None):
        for none in (torch.nn.Linear(2, 2), model.config, None):
            with pytest.raises(ValueError, match=f"{type(none).__name__} is no model of transformers"):
                configure(none, settings)
    with pytest.raises(ValueError, match=r"settings must be a MobaConfig, got \{'block_size': 4"):
        configure(model, table)
    with pytest.raises(ValueError, match="settings must be a MobaConfig, got None"):
        convert(tmp_path, tmp_path / "out", None)
    with pytest.raises(
        ValueError, match="source must be a folder or a name on the hub, got a LlamaForCausalLM; a model"
    ):
        convert(model, tmp_path / "out", MOBA)
    for odd in (8, "8", [4, 2]):
        with pytest.raises(ValueError, match=r"moba must be a table such as .* got "):
            LlamaConfig(moba=odd)
    assert LlamaConfig(moba=table).moba == table


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        (Qwen2MoeConfig, MOE),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": LAYERS}),
    ],
)
def test_windows_of_layers_that_are_not_there_do_not_matter(kind: Any, entries: dict[str, Any]) -> None:
    model = build(kind, **entries)
    assert model.config.sliding_window in (0, 4)
    full = logits(model)
    torch.testing.assert_close(logits(configure(model, MobaConfig(4, 99))), full)
    assert not torch.allclose(logits(configure(model, MOBA)), full)


ELSEWHERE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained(sys.argv[1]).architectures == ["LlamaForCausalLM"]
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
print(AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa").config._attn_implementation)
print([name for name in sys.modules if name.startswith("openmoba")])
"""


def test_without_openmoba_a_saved_model_does_not_load_by_accident(tmp_path: Path) -> None:
    """In a process of its own: here transformers knows what "moba" is."""
    build(LlamaConfig).save_pretrained(tmp_path / "full")
    convert(tmp_path / "full", tmp_path / "converted", MOBA)
    configure(build(LlamaConfig), MOBA).save_pretrained(tmp_path / "saved")
    entries = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("converted", "saved")]
    assert entries[0] == entries[1]
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "saved")]
    error, *others = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert 'attn_implementation="moba (import openmoba.hf)"` is not supported' in error
    assert '"attn_implementation=sdpa"' in error
    assert others == ["sdpa", "[]"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [({}, "moba"), ({"attn_implementation": None}, "moba"), ({"attn_implementation": "sdpa"}, "sdpa")],
)
def test_a_saved_model_is_moba_unless_another_attention_is_asked_for(asked: Any, found: str, tmp_path: Path) -> None:
    model = configure(build(LlamaConfig), MOBA)
    model.save_pretrained(tmp_path / "first")
    for kind in (AutoModelForCausalLM, type(model)):
        loaded = kind.from_pretrained(tmp_path / "first", **asked)
        assert loaded.config._attn_implementation == found
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_full_attention_leaves_no_trace(tmp_path: Path) -> None:
    configure(configure(build(LlamaConfig), MOBA), None).save_pretrained(tmp_path)
    assert not {"moba", "attn_implementation"} & set(json.loads((tmp_path / "config.json").read_text()))
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation is None


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("masked", [False, True])
def test_configured_models_are_exported_with_a_dynamic_length(masked: bool) -> None:
    model = _Logits(configure(build(LlamaConfig), MobaConfig(4, 2, full_layers=1)))

    def batch(tokens: int, padding: int = 0) -> tuple[torch.Tensor, ...]:
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[0, :padding] = 0
        ids = torch.randint(3, 61, (2, tokens), generator=torch.Generator().manual_seed(0))
        return (ids, mask) if masked else (ids,)

    lengths = {1: Dim("tokens", min=17, max=64)}  # shorter rows, and such of few blocks, take other ways
    program = export(model, batch(24), dynamic_shapes=(lengths, lengths)[: 1 + masked]).module()
    for inputs in (batch(24), batch(40, padding=5 if masked else 0)):
        real = inputs[1][..., None] if masked else 1
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs) * real, model(*inputs) * real)


@pytest.mark.parametrize(
    ("causal", "given", "message"),
    [
        (True, {"dropout": 0.1}, "no attention dropout in MoBA, got 0.1"),
        (True, {"is_causal": False}, "MoBA is causal attention, and this layer is not"),
        (False, {}, "MoBA is causal attention, and this layer is not"),
        (True, {"softcap": 30.0}, r"soft-capped logits \(layer 3 was given softcap\)"),
        (True, {"s_aux": torch.ones(2)}, r"attention sinks \(layer 3 was given s_aux\)"),
        (True, {"sliding_window": 8}, "a sliding window; set sliding_window=None"),
    ],
)
def test_other_attention_that_a_layer_asks_for_is_refused(causal: bool, given: dict[str, Any], message: str) -> None:
    layer, x = SimpleNamespace(is_causal=causal, layer_idx=3), torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match=message):
        attention_forward(layer, x, x, x, None, **given)
