"""Tokens per second of vLLM, with MoBA and with full attention, over the length of the context.

    OMP_NUM_THREADS=1 build/vllm/bin/python benchmarks/serving.py results/cpu/serving.csv

measures whatever vLLM runs on (`make test-vllm` makes build/vllm, for a CPU). The same random model, bf16, is served by
the same engine, as it is, with MoBA in every layer, and with MoBA and key convolution; attention alone differs. Prompts
are computed in chunks, one after the other, timed, and stay in the prefix cache. Then 1 to 32 requests decode together,
each step timed. The file is written after each model.

On a CPU: four layers, one thread, its processor's seconds, so that what else the machine does counts little. Requests
share one prompt, so a large batch finds more of its pages in the processor's cache than requests of their own would.
On a GPU: twelve layers, compiled and in CUDA graphs as vLLM does by itself, seconds of the clock. Each request has a
prompt of its own, and the prefill is the median over them: the first ones also compile kernels.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

# Steps are timed from outside of the engine, and draw the likeliest tokens, which takes no sampler of FlashInfer's.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}

import torch
import vllm
from transformers import AutoModelForCausalLM, Qwen3Config
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform

from openmoba import MobaConfig
from openmoba.hf import configure
from openmoba.records.provenance import provenance

MOBA = MobaConfig(block_size=128, top_k=8)
SETTINGS = {"full": None, "moba": MOBA, "moba with key convolution": replace(MOBA, key_conv=4)}
BATCHES = (1, 8, 32)
WORDS = 320


@dataclass(frozen=True)
class Case:
    """What is served and how it is timed, on one kind of device."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    width: int
    contexts: tuple[int, ...]
    prompts: int
    """Different prompts of each length."""
    steps: int
    """Tokens that each request decodes."""
    clock: Callable[[], float]
    """Seconds."""
    engine: dict[str, Any]
    """vLLM's options."""


CASES = {
    "cpu": Case(
        layers=4,
        hidden=512,
        heads=8,
        kv_heads=2,
        width=64,
        contexts=(2048, 4096, 8192, 16384, 32768),
        prompts=1,
        steps=16,
        clock=time.process_time,
        engine={"enforce_eager": True, "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 2**30},
    ),
    "cuda": Case(
        layers=12,
        hidden=2048,
        heads=16,
        kv_heads=4,
        width=128,
        contexts=(8192, 32768, 131072),
        prompts=max(BATCHES),
        steps=64,
        clock=time.perf_counter,
        engine={"max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 104 * 2**30},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the CSV file to write")
    out, case = parser.parse_args().out, CASES[current_platform.device_type]
    source = provenance()
    origin = {
        "cpu": source["hardware"]["cpu"],
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(source["hardware"]["gpus"]),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "commit": source["commit"],
    }
    # An engine gives its memory back when its process ends. Not a Pool, whose processes may start no others.
    apart = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with TemporaryDirectory() as folder, apart:
        rows = []
        for name, setting in SETTINGS.items():
            model = save_model(Path(folder) / name, case, setting)
            rows += [row | origin for row in apart.submit(measured, name, model).result()]
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print(out.read_text(), end="")


def save_model(folder: Path, case: Case, setting: MobaConfig | None) -> Path:
    """Save a random model with a setting; filters of key convolution are random, too."""
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.width,
        max_position_embeddings=max(case.contexts) + case.steps,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    configure(model, setting)
    for name, weight in model.named_parameters():
        if "key_conv" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


def measured(name: str, model: Path) -> list[dict[str, Any]]:
    """Time an engine at each length and batch."""
    case, rows = CASES[current_platform.device_type], []
    llm = vllm.LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=128,
        max_num_seqs=max(BATCHES),
        **case.engine,
    )
    setting = SETTINGS[name]
    settings = {
        "attention": name,
        "block_size": setting and setting.block_size,
        "top_k": setting and setting.top_k,
        "key_conv": setting and setting.key_conv,
    }
    for context in case.contexts:
        generator = torch.Generator().manual_seed(context)
        prompts = torch.randint(0, WORDS, (case.prompts, context), generator=generator).tolist()
        rates = []
        for prompt in prompts:
            start = case.clock()
            list(steps(llm, [prompt], 1, case.clock))
            rates.append(context / (case.clock() - start))
        prefill = median(rates)
        for batch in BATCHES:
            asked = [prompts[request % len(prompts)] for request in range(batch)]
            seconds = [took for took, new in steps(llm, asked, case.steps, case.clock) if new == batch][1:]
            cuts = quantiles(seconds, n=5)
            print(name, context, batch, f"prefill {prefill:.0f}/s, step {1e3 * cuts[1]:.2f} ms", flush=True)
            row = settings | {
                "context": context,
                "batch": batch,
                "prefill_tokens_per_s": f"{prefill:.6g}",
                "decode_tokens_per_s": f"{batch / median(seconds):.6g}",
                "step_p20_ms": f"{1e3 * cuts[0]:.6g}",
                "step_p80_ms": f"{1e3 * cuts[-1]:.6g}",
                "steps": len(seconds),
            }
            rows.append(row)
    return rows


def steps(llm: Any, prompts: list[list[int]], count: int, clock: Callable[[], float]) -> Iterator[tuple[float, int]]:
    """Serve `count` tokens to each prompt; seconds of each step, and how many requests it advanced."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    for request, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(request), TokensPrompt(prompt_token_ids=prompt), sampling)
    while llm.llm_engine.has_unfinished_requests():
        start = clock()
        advanced = llm.llm_engine.step()
        yield clock() - start, len(advanced)


if __name__ == "__main__":
    main()
