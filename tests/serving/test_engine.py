"""A real engine of vLLM on the CPU, in this process: its tokens are those of `openmoba generate`."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import (
    Engine,
    Generated,
    assert_beginning_again_changes_nothing,
    assert_processes_change_nothing,
    log_probabilities,
    new_tokens,
    prompts,
    save_full,
    save_moba,
    serve,
)
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt

import openmoba.hf  # noqa: F401  registers the attention that saved models ask for
from openmoba import MobaConfig
from openmoba.vllm import cpu
from openmoba.vllm.layers import MobaLayer

HYBRID = MobaConfig(block_size=16, top_k=3, full_layers=(1,))
"""Blocks smaller than pages: two in one of 32 tokens."""
LONG_BLOCKS = MobaConfig(block_size=64, top_k=2, full_layers=(0, 3))
"""Blocks larger than pages: one in two of 32 tokens."""


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """What MoBA layers were asked for, call by call: new tokens and length of each request."""
    seen = []
    forward = MobaLayer.forward

    def watched(self: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, batch: Any, *rest: Any, **more: Any) -> Any:
        if batch is not None and self.served.is_sparse(layer.layer_name):
            news = batch.query_start_loc.diff().tolist()
            seen.append(list(zip(news, batch.seq_lens.tolist(), strict=True)))
        return forward(self, layer, q, k, v, cache, batch, *rest, **more)

    monkeypatch.setattr(MobaLayer, "forward", watched)
    return seen


def test_tokens_are_those_of_generate(full: Path, engine: Engine, generated: Generated, batches: Any) -> None:
    """Eight requests at once, prompts in chunks between the steps of others, a full layer among MoBA's."""
    folder = save_moba(full, HYBRID)
    asked = prompts(5, 31, 64, 200, 301, 450, 16, 90)
    expected = [generated(folder, prompt, 128) for prompt in asked]
    with engine(folder, block_size=32, max_num_batched_tokens=128) as llm:
        got = new_tokens(serve(llm, asked, 128))
    assert [len(tokens) for tokens in expected] == [128] * 8
    assert got == expected
    assert any(len(batch) == 8 and all(new == 1 for new, _ in batch) for batch in batches), "all decode together"
    mixed = [batch for batch in batches if any(new == 1 for new, _ in batch) and any(new > 16 for new, _ in batch)]
    assert any(1 < new < length for batch in mixed for new, length in batch), "a later chunk, beside others' steps"


@pytest.mark.parametrize("settings", [HYBRID, LONG_BLOCKS], ids=["in a page", "over pages"])
def test_a_shared_prefix(settings: MobaConfig, full: Path, engine: Engine, generated: Generated, batches: Any) -> None:
    """Later requests read pages and centroids that earlier ones wrote, up to the middle of a block."""
    folder = save_moba(full, settings)
    first, *tails = prompts(224, 40, 90, 3, seed=2)
    asked = [first[:shared] + tail for shared, tail in zip((224, 96, 224), tails, strict=True)]
    expected = [generated(folder, prompt, 24) for prompt in (first, *asked)]
    with engine(folder, block_size=32, max_num_batched_tokens=512) as llm:
        got = new_tokens(serve(llm, [first], 24))
        batches.clear()
        outputs = serve(llm, asked, 24)
    assert got + new_tokens(outputs) == expected
    assert [output.num_cached_tokens for output in outputs] == [224, 96, 224]
    assert sorted(batches[0]) == [(3, 227), (40, 264), (90, 186)]


def test_requests_that_share_a_prefix_at_once(full: Path, engine: Engine, generated: Generated) -> None:
    """The second reads pages that the first writes in the same step."""
    folder = save_moba(full, HYBRID)
    first, *tails = prompts(128, 20, 50, seed=3)
    asked = [first + tail for tail in tails]
    expected = [generated(folder, prompt, 16) for prompt in asked]
    with engine(folder, block_size=32, max_num_batched_tokens=1024) as llm:
        outputs = serve(llm, asked, 16)
    assert [output.num_cached_tokens for output in outputs] == [0, 128]
    assert new_tokens(outputs) == expected


def test_too_few_pages(full: Path, engine: Engine, generated: Generated, batches: Any) -> None:
    assert_beginning_again_changes_nothing(save_moba(full, HYBRID), engine, generated, batches)


def test_a_request_longer_than_the_model(full: Path, engine: Engine, generated: Generated) -> None:
    folder = save_moba(full, HYBRID)
    long, short = prompts(1025, 40, seed=5)
    with engine(folder, block_size=32) as llm:
        with pytest.raises(VLLMValidationError, match="1024 tokens"):
            serve(llm, [long], 1)
        assert new_tokens(serve(llm, [short], 16)) == [generated(folder, short, 16)]


def test_aborts(full: Path, engine: Engine, generated: Generated) -> None:
    """A request that is taken back in the middle of its prompt, one while it decodes; others go on, on their pages."""
    folder = save_moba(full, HYBRID)
    asked = prompts(300, 50, 80, seed=6)
    expected = [generated(folder, prompt, 24) for prompt in asked]
    with engine(folder, block_size=32, max_num_batched_tokens=128) as llm:
        core = llm.llm_engine
        for name, prompt in zip("abc", asked, strict=True):
            sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
            core.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
        core.step()
        core.abort_request(["a"])
        for _ in range(8):
            core.step()
        core.abort_request(["b"])
        core.add_request("again", TokensPrompt(prompt_token_ids=asked[0]), sampling)
        done = {}
        while core.has_unfinished_requests():
            done |= {output.request_id: output for output in core.step() if output.finished}
    assert sorted(done) == ["again", "c"]
    assert new_tokens([done["again"], done["c"]]) == [expected[0], expected[2]]


def test_models_without_settings_get_what_they_got(full: Path, engine: Engine, generated: Generated) -> None:
    prompt, folder = prompts(300, seed=7)[0], save_moba(full, HYBRID)
    with engine(full, block_size=32) as llm:
        kinds = set(llm.apply_model(lambda model: [type(layer.self_attn.attn.impl) for layer in model.model.layers])[0])
        got = new_tokens(serve(llm, [prompt], 32))
    assert cpu.Layer not in kinds
    assert got == [generated(full, prompt, 32)]
    assert got != [generated(folder, prompt, 32)], "MoBA would give other tokens"


def kept_heads(model: Any) -> list[tuple[str, int | None]]:
    """Names of the layers that a process has, and of how many key heads each one keeps centroids."""
    layers = [layer.self_attn.attn for layer in model.model.layers if hasattr(layer, "self_attn")]
    found = [(layer.layer_name, layer.impl.centroids) for layer in layers]
    return [(name.split(".")[2], None if centroids is None else centroids.shape[2]) for name, centroids in found]


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    ("split", "kv_heads", "kept"),
    [
        ({"tensor_parallel_size": 2}, 2, [[("0", 1), ("1", None), ("2", 1), ("3", 1)]] * 2),
        ({"tensor_parallel_size": 2}, 1, [[("0", 1), ("1", None), ("2", 1), ("3", 1)]] * 2),
        # Compiled: vLLM then runs the model once before it serves, without which layers cannot be split on a CPU.
        ({"pipeline_parallel_size": 2, "enforce_eager": False}, 2, [[("0", 2), ("1", None)], [("2", 2), ("3", 2)]]),
    ],
    ids=["heads", "copies of a head", "layers"],
)
def test_two_processes(
    split: dict[str, Any],
    kv_heads: int,
    kept: Any,
    tmp_path: Path,
    engine: Engine,
    generated: Generated,
) -> None:
    """Heads are split, and a key head that is there once is in both; or layers are, and keep their numbers."""
    folder = save_moba(save_full(tmp_path / "full", num_key_value_heads=kv_heads), HYBRID)
    assert_processes_change_nothing(folder, engine, generated, split, kept_heads, kept)


def test_16_bits(full: Path, engine: Engine) -> None:
    """Log-probabilities of a given text are as near to those in fp32 as transformers' are in 16 bits.

    Rounding moves keys, so some blocks are chosen otherwise, in either engine.
    """
    folder, asked = save_moba(full, HYBRID), prompts(400, 300, seed=8)
    with engine(folder, dtype="bfloat16", block_size=32, max_num_batched_tokens=128) as llm:
        outputs = serve(llm, asked, 1, prompt_logprobs=0)
    got = [next(iter(entry.values())).logprob for output in outputs for entry in output.prompt_logprobs[1:]]
    short = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    wide = deepcopy(short).float()  # the same rounded weights
    exact, rounded = (torch.cat([log_probabilities(model, prompt) for prompt in asked]) for model in (wide, short))
    error, known = (torch.tensor(got) - exact).abs().mean(), (rounded - exact).abs().mean()
    print(error, known)
    assert 0 < error < 1.5 * known
