"""MoBA over a server's pages from end to end: in transformers' continuous batching, in the place of a server.

A vehicle to test `openmoba.moba_paged` with, no product: later releases of transformers have another interface.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from openmoba import MobaConfig, complete_paged, moba_paged, new_paged_centroids
from openmoba.hf import configure
from openmoba.hf.releases import CHECKPOINTING

pytestmark = pytest.mark.skipif(
    CHECKPOINTING != "gradient_checkpointing", reason="newer transformers closed what this hangs on"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, BLOCK, TOP_K, FULL_LAYER, NEW = 32, 16, 3, 1, 24


class Paged:
    """An attention function over pages: MoBA, and in one layer full attention, which is MoBA of all blocks."""

    def __init__(self) -> None:
        self.centroids: dict[int, Tensor] = {}
        self.batches: list[list[tuple[int, int]]] = []

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **given: Any) -> tuple[Tensor, None]:
        cache, layer = given["cache"], module.layer_idx
        group, place = cache.layer_index_to_group_indices[layer]
        slots = given["read_index"][group]
        cache.update(k, v, layer, given["read_index"], given["write_index"])
        starts_q, starts_k = (given[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
        if not len(slots):  # whole prompts only: what is written is all there is
            slots, starts_k = given["write_index"][group], starts_q
        table = [slots[start : end : cache.block_size].tolist() for start, end in pairwise(starts_k)]
        longest = max(map(len, table))
        rows = [[slot // cache.block_size for slot in row] + [-1] * (longest - len(row)) for row in table]
        lengths = [end - start for start, end in pairwise(starts_k)]
        whole = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        k_pages, v_pages = cache.key_cache[place].view(whole), cache.value_cache[place].view(whole)
        if layer not in self.centroids:
            self.centroids[layer] = new_paged_centroids(k_pages, BLOCK)
        batch = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in (rows, lengths, starts_q)]
        complete_paged(self.centroids[layer], k_pages, *batch, BLOCK)
        self.batches.append(
            [(end - start, length) for (start, end), length in zip(pairwise(starts_q), lengths, strict=True)]
        )
        top_k = 10**4 if layer == FULL_LAYER else TOP_K
        out = moba_paged(
            q[0].transpose(0, 1), k_pages, v_pages, self.centroids[layer], *batch, block_size=BLOCK, top_k=top_k
        )
        return out[None], None


def test_tokens_are_those_of_generate() -> None:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 320, (n,), generator=generator).tolist() for n in (5, 64, 201)]
    configure(model, MobaConfig(block_size=BLOCK, top_k=TOP_K, full_layers=(FULL_LAYER,)))
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        wanted.append(out[0, len(prompt) :].tolist())
    configure(model, None)
    paged = Paged()
    AttentionInterface.register("paged|moba-test", paged)
    model.set_attn_implementation("paged|moba-test")
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=PAGE, num_blocks=64, max_batch_tokens=96, use_cuda_graph=False, use_async_batching=False
        ),
        warmup=False,
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [by_prompt[tuple(prompt)] for prompt in prompts] == wanted
    assert any(new == 1 for batch in paged.batches for new, _ in batch)
    assert any(1 < new < length for batch in paged.batches for new, length in batch), "a later chunk of a prompt"
