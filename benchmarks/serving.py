"""Tokens per second of vLLM on this machine's CPU, with MoBA and with full attention, over the length of the context.

    OMP_NUM_THREADS=1 build/vllm/bin/python benchmarks/serving.py

writes results/cpu/serving.csv (`make test-vllm` makes build/vllm). The same random model of four layers, bf16, is
served by the same engine, once with MoBA in every layer and once as it is; attention alone differs. A prompt is
computed in chunks, timed, and stays in the prefix cache. Then 1 to 32 requests with this prompt decode together, each
step timed: pages are shared, so a large batch finds more of them in the processor's cache than requests of their own
would. Seconds are the processor's, of one thread: what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are timed from outside of the engine

import torch
import vllm
from transformers import AutoModelForCausalLM, Qwen3Config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt

from openmoba import MobaConfig
from openmoba.hf import convert
from openmoba.records.provenance import provenance

OUT = Path(__file__).parent.parent / "results" / "cpu" / "serving.csv"
MOBA = MobaConfig(block_size=128, top_k=8)
CONTEXTS = (2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 8, 32)
STEPS, CHUNK, WORDS = 16, 2048, 320


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    source = provenance()
    origin = {
        "cpu": source["hardware"]["cpu"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "commit": source["commit"],
    }
    with TemporaryDirectory() as folder:
        full = save_model(Path(folder) / "full")
        models = {"full": full, "moba": convert(full, Path(folder) / "moba", MOBA)}
        rows = [row | origin for name, model in models.items() for row in measured(name, model)]
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(OUT.read_text(), end="")


def save_model(folder: Path) -> Path:
    """Save a random model: four layers, eight heads of width 64, two key/value heads."""
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max(CONTEXTS) + 64,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def measured(name: str, model: Path) -> Iterator[dict[str, Any]]:
    """Time an engine at each length and batch."""
    llm = vllm.LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        block_size=128,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=max(BATCHES),
        kv_cache_memory_bytes=2**30,
    )
    settings = {"attention": name, "block_size": "", "top_k": ""}
    if name == "moba":
        settings |= {"block_size": MOBA.block_size, "top_k": MOBA.top_k}
    for context in CONTEXTS:
        prompt = torch.randint(0, WORDS, (context,), generator=torch.Generator().manual_seed(context)).tolist()
        start = time.process_time()
        list(steps(llm, prompt, 1, 1))
        prefill = context / (time.process_time() - start)
        for batch in BATCHES:
            seconds = [took for took, new in steps(llm, prompt, batch, STEPS) if new == batch][1:]
            cuts = quantiles(seconds, n=5)
            print(name, context, batch, f"prefill {prefill:.0f}/s, step {1e3 * cuts[1]:.2f} ms", flush=True)
            yield settings | {
                "context": context,
                "batch": batch,
                "prefill_tokens_per_s": f"{prefill:.6g}",
                "decode_tokens_per_s": f"{batch / quantiles(seconds, n=2)[0]:.6g}",
                "step_p20_ms": f"{1e3 * cuts[0]:.6g}",
                "step_p80_ms": f"{1e3 * cuts[-1]:.6g}",
                "steps": len(seconds),
            }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def steps(llm: Any, prompt: list[int], batch: int, count: int) -> Iterator[tuple[float, int]]:
    """Serve a prompt to `batch` requests of `count` tokens; seconds of each step, and how many requests it advanced."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    for request in range(batch):
        llm.llm_engine.add_request(str(request), TokensPrompt(prompt_token_ids=prompt), sampling)
    while llm.llm_engine.has_unfinished_requests():
        start = time.process_time()
        advanced = llm.llm_engine.step()
        yield time.process_time() - start, len(advanced)


if __name__ == "__main__":
    main()
