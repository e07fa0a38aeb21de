"""Run by `test_parallel_gpu.py` on every GPU; started alone, what one GPU makes of the same."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import openmoba
from openmoba import MobaConfig, parallel
from openmoba.hf import configure
from openmoba.hf.context_parallel import ContextParallel
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from openmoba.lab.train.run import run_training
from openmoba.ops.key_conv import key_convolution
from openmoba.parallel import Sharding, leave_group
from openmoba.records import disk

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
LENGTH = 4000  # which 16 does not divide, so neither do the chunks of any layout


class Split(ContextParallel, Trainer):
    pass


def attention() -> dict[str, float]:
    """Largest error of both passes by way and layout."""
    generator = torch.Generator("cuda").manual_seed(0)
    whole = [
        torch.randn(1, LENGTH, heads, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (8, 2, 2)
    ]

    def passes(tensors: list[Tensor], sharding: Sharding | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        settings: dict[str, Any] = {"block_size": 64, "top_k": 4}
        if sharding is None:
            out = openmoba.moba_attention(*leaves, **settings)
        else:
            out = parallel.moba_attention(*leaves, sharding, **settings)
        out.backward(torch.ones_like(out))
        results = [out, *(x.grad for x in leaves)]
        return results if sharding is None else [sharding.unshard(x) for x in results]

    expected = passes(whole, None)
    found = {}
    for way in ("heads", "keys"):
        for layout in ("contiguous", "head-tail"):
            sharding = Sharding.over(None, LENGTH, way=way, layout=layout)
            found[f"{way} {layout}"] = worst(passes([sharding.shard(x) for x in whole], sharding), expected)
    return found


def convolution() -> dict[str, float]:
    """Largest error of keys and their gradients after key convolution, by layout."""
    generator = torch.Generator("cuda").manual_seed(0)
    k = torch.randn(1, LENGTH, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, 4, generator=generator, device="cuda", dtype=torch.bfloat16)

    def passes(x: Tensor, convolve: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = convolve(leaf, weight)
        out.backward(torch.ones_like(out))
        return [out, leaf.grad]

    expected, found = passes(k, key_convolution), {}
    for layout in ("contiguous", "head-tail"):
        sharding = Sharding.over(None, LENGTH, layout=layout)
        results = passes(sharding.shard(k), partial(parallel.key_convolution, sharding=sharding))
        found[f"key convolution {layout}"] = worst([sharding.unshard(x) for x in results], expected)
    return found


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of any, over the largest value expected."""
    pairs = zip(found, expected, strict=True)
    return max(float((x.float() - y.float()).abs().max() / y.float().abs().max()) for x, y in pairs)


def losses(folder: str) -> list[float]:
    """Losses of a hybrid in training, through accelerate's own mesh where there are several GPUs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
    )
    model = configure(LlamaForCausalLM(config), MobaConfig(block_size=64, top_k=4, full_layers=1, key_conv=4))
    ids = torch.randint(256, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {}
    if RANKS > 1:
        from accelerate import ParallelismConfig

        settings = {"fsdp": True, "parallelism_config": ParallelismConfig(cp_size=RANKS)}
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=1,
        logging_steps=1,
        bf16=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = Split(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids])
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def laboratory(folder: Path) -> list[float]:
    """Losses and gradients of a hybrid in training, and its evaluation, by `openmoba train`.

    Over GPUs with FSDP2 and compiled layers, whose try-out once left gradients to the first step.
    """
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(6 if int(os.environ.get("RANK", "0")) == 0 else 0):
        text = "".join(f"{i} times {number} is {i * number}, " for i in range(600))
        (texts / f"{number}.txt").write_text(text)
    if RANKS > 1:
        torch.distributed.barrier()
    config = RunConfig(
        data=DataConfig(str(texts), hold_out=3, tokenizer="bytes", length=2000, cache=str(folder / "cache")),
        model=ModelConfig(size="5m"),
        arm=ArmConfig("hybrid", 64, 4, full_layers=1),
        train=TrainConfig(
            steps=3,
            batch_size=1,
            learning_rate=1e-4,
            log_every=1,
            checkpoint_every=3,
            context_parallel=RANKS,
            fsdp=RANKS > 1,
            compile="layers" if RANKS > 1 else "off",
        ),
        eval=EvalConfig(windows=2),
    )
    run = folder / f"laboratory-{RANKS}"
    run_training(config, run)
    if RANKS > 1:
        torch.distributed.barrier()
    rows = disk.read(run / "metrics.jsonl")
    trained = [row[name] for row in rows if row["kind"] == "train" for name in ("loss", "grad_norm")]
    return [*trained, *(row["lm_loss"] for row in rows if row["kind"] == "eval")]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found: dict[str, Any] = {"losses": losses(str(out.parent / "trainer"))}
    if RANKS > 1:
        found["errors"] = attention() | convolution()
    found["laboratory"] = laboratory(out.parent)
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(found))
    leave_group()
