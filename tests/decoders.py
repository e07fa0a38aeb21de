"""Small decoders of transformers with random weights, and what they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from openmoba.lab.data.tokenizer import byte_tokenizer

VOCAB, LAYERS = 61, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BYTES = SIZES | {"vocab_size": 320, "max_position_embeddings": 1024, "pad_token_id": 256, "eos_token_id": 256}

QUIETLY = {
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Arguments of a Trainer on the CPU that writes nothing and logs every step."""


def build(config: Any = None) -> Any:
    """A small decoder whose attention is far from uniform, so that a wrong choice of blocks shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES))
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(12)
    return model.eval()


def save_model(folder: Path, kind: Any = LlamaConfig, **entries: Any) -> Any:
    """Save one that reads bytes, with its tokenizer."""
    model = build(kind(**(BYTES | entries)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def stacked(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def losses(trainer: Any) -> list[float]:
    """What a Trainer logged."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits
