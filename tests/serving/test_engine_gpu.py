"""A real engine of vLLM on a GPU, in this process: long prompts in chunks, pages that are shared, many steps."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import Engine, log_probabilities, prompts, save_full, save_moba, save_trained, serve
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

import openmoba.hf  # noqa: F401  registers the attention that saved models ask for
from openmoba import MobaConfig
from openmoba.vllm import cuda

HYBRID = MobaConfig(block_size=128, top_k=3, full_layers=(3,))
MODELS = {
    "full": lambda full: full,
    "moba": lambda full: save_moba(full, HYBRID),
    "keys": lambda full: save_trained(full, replace(HYBRID, key_conv=4)),
}
LENGTHS = (3000, 4096, 5000, 12288, 6001, 7168, 9000, 11111)
SHARED, NEW = 2048, 64
"""Tokens with which the last four prompts begin as the first one does; tokens that each request gets."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention, of heads that are as wide as those of real ones."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 128}
    folder = tmp_path_factory.mktemp("wide") / "full"
    return save_full(folder, max_position_embeddings=16384, initializer_range=0.05, **sizes)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("attention", ["moba", "full", "keys"])
def test_log_probabilities(attention: str, eager: bool, wide: Path, engine: Engine) -> None:
    """Those of prompts, and of tokens that are generated, are as near to those in fp32 as transformers' in bf16.

    Rounding moves keys, so some blocks are chosen otherwise, in either engine. Full attention is beside it, and
    MoBA with key convolution.
    """
    folder, kind = MODELS[attention](wide), FlashAttentionImpl if attention == "full" else cuda.Layer
    first, *others = prompts(*LENGTHS)
    asked = [first, *others[:3], *(first[:SHARED] + prompt[SHARED:] for prompt in others[3:])]
    options = {"enforce_eager": eager, "max_model_len": 16384, "max_num_batched_tokens": 2048, "block_size": 128}
    memory = {"kv_cache_memory_bytes": 2**32, "gpu_memory_utilization": 0.2}
    with engine(folder, dtype="bfloat16", **options, **memory) as llm:
        kinds = llm.apply_model(lambda model: {type(layer.self_attn.attn.impl) for layer in model.model.layers})
        given = serve(llm, asked, 1, prompt_logprobs=0)
        llm.reset_prefix_cache()
        outputs = serve(llm, asked, NEW, logprobs=0)
    assert kinds == [{kind}]
    assert [output.num_cached_tokens for output in outputs] == [0] * 4 + [SHARED] * 4
    texts = [prompt + list(output.outputs[0].token_ids) for prompt, output in zip(asked, outputs, strict=True)]
    exact, rounded = transformers_values(folder, texts)
    got = [
        [*chosen(prompt.prompt_logprobs[1:]), *chosen(output.outputs[0].logprobs)]
        for prompt, output in zip(given, outputs, strict=True)
    ]
    for part, of in (("prompts", slice(-NEW)), ("new tokens", slice(-NEW, None))):
        error, known = (
            torch.cat([(torch.tensor(x)[of] - y[of]).abs() for x, y in zip(values, exact, strict=True)])
            for values in (got, rounded)
        )
        told = f"vLLM {error.mean():.5f}, at most {error.max():.3f}; transformers {known.mean():.5f}, {known.max():.3f}"
        print(f"{attention}, {'eager' if eager else 'compiled'}, {part}: from fp32 {told}")
        assert 0 < error.mean() < 1.5 * known.mean()


def chosen(entries: list[Any]) -> list[float]:
    """Return the log-probability of each token that a text has."""
    return [next(iter(entry.values())).logprob for entry in entries]


def transformers_values(folder: Path, texts: list[list[int]]) -> list[list[Tensor]]:
    """Return log-probabilities of texts by a model's weights in bf16, computed in fp32, and in bf16."""
    short = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().cuda()
    wide = deepcopy(short).float()  # the same rounded weights
    return [[log_probabilities(model, text).cpu() for text in texts] for model in (wide, short)]
