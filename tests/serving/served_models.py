"""Small models to serve: a word is a token, so that texts and tokens say the same, and none ends a text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from openmoba import MobaConfig
from openmoba.hf import configure, convert

WORDS = 320
Engine = Callable[..., AbstractContextManager[Any]]
"""Folder and options -> an engine for a while."""
Generated = Callable[[Path, list[int], int], list[int]]
"""Folder, prompt, count -> the tokens with which `openmoba generate` continues."""


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}


def save_full(folder: Path, **sizes: Any) -> Path:
    """Save a model of four layers, fp32, whose next token depends on all that came before."""
    sizes = {"num_hidden_layers": 4, **SMALL, **sizes}
    config = Qwen3Config(vocab_size=WORDS, eos_token_id=None, bos_token_id=None, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def save_moba(full: Path, settings: MobaConfig) -> Path:
    """Convert a saved model, once for each settings."""
    folder = full.with_name(f"moba-{settings.block_size}-{settings.top_k}")
    return folder if folder.exists() else convert(full, folder, settings)


def save_trained(full: Path, settings: MobaConfig) -> Path:
    """Save a hybrid with key convolution, whose filters have weights, beside the model that it is made of."""
    model = configure(AutoModelForCausalLM.from_pretrained(full), settings)
    torch.manual_seed(1)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.key_conv.weight)
    made = full.with_name("key_conv")
    model.save_pretrained(made)
    for path in full.glob("*token*.json"):
        shutil.copy(path, made)
    return made


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Draw prompts of these lengths, in tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS, (length,), generator=generator).tolist() for length in lengths]


def text(tokens: list[int]) -> str:
    """Return the words of tokens."""
    return " ".join(f"w{token}" for token in tokens)


def tokens(words: str) -> list[int]:
    """Return the tokens of words."""
    return [int(word.removeprefix("w")) for word in words.split()]


def serve(llm: Any, asked: list[list[int]], count: int, **options: Any) -> list[Any]:
    """Generate greedily for all prompts at once."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)
    return llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked], sampling, use_tqdm=False)


def new_tokens(outputs: list[Any]) -> list[list[int]]:
    """Return the tokens that each request got."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_beginning_again_changes_nothing(folder: Path, engine: Engine, generated: Generated, batches: Any) -> None:
    """Requests that lose their pages to others begin again; pages are written by one request after another."""
    asked = prompts(60, 61, 62, 63, 64, seed=4)
    expected = [generated(folder, prompt, 70) for prompt in asked]
    with engine(folder, block_size=32, num_gpu_blocks_override=14, max_model_len=160) as llm:
        got = new_tokens(serve(llm, asked, 70))
    assert got == expected
    assert any(new > 64 for batch in batches for new, _ in batch), "a request began again with its own tokens"


def assert_processes_change_nothing(
    folder: Path, engine: Engine, generated: Generated, split: dict[str, Any], of_each: Callable[[Any], Any], found: Any
) -> None:
    """Two processes give the tokens of one, and `of_each` finds this in the models of both."""
    asked = prompts(5, 200, 301, seed=10)
    expected = [generated(folder, prompt, 32) for prompt in asked]
    with engine(folder, block_size=32, max_num_batched_tokens=128, **split) as llm:
        got = new_tokens(serve(llm, asked, 32))
        assert llm.apply_model(of_each) == found
    assert got == expected


def log_probabilities(model: Any, prompt: list[int]) -> Tensor:
    """Return those of each token of a prompt but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt], device=model.device)).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:], device=model.device)[:, None])[:, 0]
