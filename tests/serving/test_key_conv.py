"""Key convolution in a real engine: the tokens of `openmoba generate`, over vLLM's pages, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from raw_key_pages import Kept
from served_models import (
    Engine,
    Generated,
    assert_beginning_again_changes_nothing,
    assert_processes_change_nothing,
    new_tokens,
    prompts,
    save_full,
    save_moba,
    save_trained,
    serve,
)
from torch import fx, nn
from vllm.compilation.partition_rules import should_split
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from openmoba import MobaConfig
from openmoba.ops.raw_keys import NewTokens
from openmoba.vllm import key_conv

HYBRID = MobaConfig(block_size=16, top_k=3, full_layers=(1,), key_conv=4)


@pytest.fixture(scope="module")
def folder(full: Path) -> Path:
    return save_trained(full, HYBRID)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of what new tokens keys were convolved, batch by batch: new tokens and length of each request."""
    seen = []

    def watched(table: Any, lengths: Any, starts: Any, *rest: Any) -> NewTokens:
        seen.append(list(zip(starts.diff().tolist(), lengths.tolist(), strict=True)))
        return NewTokens(table, lengths, starts, *rest)

    monkeypatch.setattr(key_conv, "NewTokens", watched)
    return seen


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_tokens_are_those_of_generate(
    eager: bool, folder: Path, full: Path, engine: Engine, generated: Generated, batches: Any
) -> None:
    """Eight requests at once, prompts in chunks of any size between the steps of others."""
    asked = prompts(5, 31, 64, 200, 301, 450, 2, 90)
    expected = [generated(folder, prompt, 96) for prompt in asked]
    with engine(folder, block_size=32, max_num_batched_tokens=128, enforce_eager=eager) as llm:
        got = new_tokens(serve(llm, asked, 96))
    assert got == expected
    assert got[0] != generated(save_moba(full, MobaConfig(16, 3, (1,))), asked[0], 96), "filters change tokens"
    assert any(len(batch) == 8 and all(new == 1 for new, _ in batch) for batch in batches), "all decode together"
    starts = {(length - new) % 32 for batch in batches for new, length in batch if 1 < new < length}
    assert len(starts) > 2, "later chunks begin anywhere in a page"


def test_a_shared_prefix(folder: Path, engine: Engine, generated: Generated) -> None:
    """Pages that earlier requests wrote, and such as another one writes in the same step."""
    first, other, *tails = prompts(224, 96, 40, 90, 3, 20, 1, seed=2)
    later = [first[:shared] + tail for shared, tail in zip((224, 96, 224), tails, strict=False)]
    at_once = [other + tail for tail in tails[3:]]
    expected = [generated(folder, prompt, 24) for prompt in (first, *later, *at_once)]
    with engine(folder, block_size=32, max_num_batched_tokens=1024) as llm:
        outputs = serve(llm, [first], 24) + serve(llm, [*later, *at_once], 24)
    assert [output.num_cached_tokens for output in outputs] == [0, 224, 96, 224, 0, 96]
    assert new_tokens(outputs) == expected


def test_too_few_pages(folder: Path, engine: Engine, generated: Generated, batches: Any) -> None:
    assert_beginning_again_changes_nothing(folder, engine, generated, batches)


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    ("split", "kv_heads", "channels"),
    [
        ({"tensor_parallel_size": 2}, 2, [[32] * 4] * 2),
        ({"tensor_parallel_size": 2}, 1, [[32] * 4] * 2),
        ({"pipeline_parallel_size": 2, "enforce_eager": False}, 2, [[64] * 2] * 2),
    ],
    ids=["heads", "copies of a head", "layers"],
)
def test_two_processes(
    split: dict[str, Any],
    kv_heads: int,
    channels: Any,
    tmp_path: Path,
    engine: Engine,
    generated: Generated,
) -> None:
    """Each has the filters of its key heads or its layers."""
    folder = save_trained(save_full(tmp_path / "full", num_key_value_heads=kv_heads), HYBRID)
    assert_processes_change_nothing(folder, engine, generated, split, filters, channels)


def filters(model: Any) -> list[int]:
    """Of how many channels a process has filters, layer by layer."""
    return [len(x) for name, x in model.named_parameters() if name.endswith("self_attn.key_conv.weight")]


def test_padding_and_other_columns_are_left_alone() -> None:
    """Queries and values lie beside the keys; the real cache takes the place of a small one to measure with."""
    layer: Any = None
    for pages in (Kept(pages=20), Kept()):
        request = pages.server.begin()
        channels, width = pages.weight.shape
        layer = layer or key_conv.KeyConvolution(5, channels, width).double()
        layer.weight.data = pages.weight
        for new in (11, 1):
            pages.server.write(request, new)
            call = pages.call({request: new})
            qkv = pages.server.draw(new + 3, channels + 12)
            qkv[:new, 5 : 5 + channels] = call["keys"]
            expected = qkv.clone()
            expected[:new, 5 : 5 + channels] = pages.whole(request, new)
            batch = SimpleNamespace(
                num_actual_tokens=new,
                block_table=call["block_table"],
                seq_lens=call["lengths"],
                query_start_loc=call["starts"],
            )
            layer.convolve(qkv, batch, pages.server.pool, torch.cat([call["slots"], torch.full((3,), -1)]))
            torch.testing.assert_close(qkv, expected, rtol=1e-14, atol=1e-14)
            assert layer.batch is batch


@pytest.mark.parametrize("looked_at", [True, False], ids=["vLLM", "openmoba"])
def test_filters_that_a_model_says_it_has(
    looked_at: bool, folder: Path, full: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM sees that they are missing where it loads by default, and the plugin wherever they come from."""
    made = full.with_name(f"no-filters-{looked_at}")
    shutil.copytree(folder, made)
    shutil.copy(full / "model.safetensors", made)
    message = r"not initialized from checkpoint: .*key_conv\.weight"
    if not looked_at:
        monkeypatch.setattr(DefaultModelLoader, "track_weights_loading", lambda *_, **__: None)
        message = r"key_conv.*not in its checkpoint"
    with pytest.raises(ValueError, match=message), engine(made):
        pass


def test_filters_that_a_model_says_nothing_of(folder: Path, full: Path, engine: Engine) -> None:
    made = full.with_name("nothing-of-filters")
    shutil.copytree(folder, made)
    config = json.loads((made / "config.json").read_text())
    del config["moba"]["key_conv"]
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"key_conv"), engine(made):
        pass


def start(folder: Path, **options: Any) -> Any:
    return EngineArgs(model=str(folder), dtype="float32", max_model_len=1024, **options).create_engine_config()


def test_keys_that_nobody_projects(folder: Path) -> None:
    """In an attention module without `qkv_proj`."""
    with set_current_vllm_config(start(folder)), pytest.raises(ValueError, match=r"Module has no projection qkv_proj"):
        nn.Module().attn = Attention(4, 32, 1.0, 2, prefix="model.layers.0.self_attn.attn")


def test_graphs_are_split_where_keys_are_convolved(folder: Path, full: Path, engine: Engine) -> None:
    """As they are at attention, where vLLM splits at all."""
    at = ["vllm::unified_attention_with_output"]
    for model, expected in ((folder, [*at, key_conv.OPERATION]), (save_moba(full, MobaConfig(16, 3, (1,))), at)):
        with engine(model, block_size=32, compilation_config={"splitting_ops": list(at)}) as llm:
            assert llm.llm_engine.vllm_config.compilation_config.splitting_ops == expected
    graph = fx.Graph()
    called = torch.ops.openmoba.convolve_projected_keys
    for name in (called, called.default):
        assert should_split(graph.call_function(name), [key_conv.OPERATION])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "does not serve key convolution beside LoRA"),
        ({"model_impl": "transformers"}, "does not serve key convolution in a model of transformers'"),
    ],
    ids=["LoRA", "transformers"],
)
def test_refused(options: dict[str, Any], message: str, folder: Path, full: Path) -> None:
    start(save_moba(full, MobaConfig(16, 3, (1,))), **options)
    with pytest.raises(ValueError, match=message):
        start(folder, **options)
