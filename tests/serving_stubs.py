"""Stand-ins for the parts of vLLM that the plugin reads: a configuration, a layer's parent, a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from paging import Server
from torch import Tensor, nn

from openmoba.vllm.layers import MobaLayer
from openmoba.vllm.served import Served, served

SETTINGS = {"block_size": 4, "top_k": 2, "full_layers": [1]}
BLOCKS = {"block_size": 4, "top_k": 2}
SCALE = 0.3


def config(moba: dict[str, Any] | None = SETTINGS, **changed: Any) -> Any:
    """A `VllmConfig` as far as it is read; parts are changed as in `cache__block_size=16`."""
    text = SimpleNamespace(moba=moba, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=text, dtype=torch.bfloat16, using_transformers_backend=lambda: False
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=8, prefix_match_unit=None),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
    )
    for name, value in changed.items():
        part, _, of_part = name.partition("__")
        setattr(*((made, part) if not of_part else (getattr(made, f"{part}_config"), of_part)), value)
    return made


class FullLayer:
    """In the place of vLLM's own implementation of attention."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, **asked: Any) -> None:
        self.scale, self.asked = scale, asked

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        self.asked["dtype"] = dtype

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: Any, out: Tensor) -> Tensor:
        return out.fill_(7)


class FakeLayer(MobaLayer, FullLayer):
    """What a backend makes of both."""

    @staticmethod
    def settings() -> Served | None:
        return served(config())


def new_layer(server: Server) -> FakeLayer:
    """A layer for a server's sizes."""
    return FakeLayer(server.heads, server.width, SCALE, server.kv_heads)


def place(index: int) -> Any:
    """What vLLM calls a layer."""
    return SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn")


def batch_of(call: dict[str, Any], room: int = 3) -> Any:
    """What vLLM says of a batch of `paging.Server`; its table has room for more."""
    return SimpleNamespace(
        num_actual_tokens=int(call["cu_seqlens_q"][-1]),
        query_start_loc=call["cu_seqlens_q"],
        seq_lens=call["lengths"],
        max_seq_len=int(call["lengths"].max()),
        block_table=nn.functional.pad(call["block_table"], (0, room), value=-1),
        causal=True,
    )


def forward(layer: FakeLayer, server: Server, call: dict[str, Any], padding: int = 0) -> Tensor:
    """The output of a layer with MoBA for a batch, of which some rows behind the tokens are nobody's: -1 there."""
    q = nn.functional.pad(call["q"], (0, 0, 0, 0, 0, padding))
    out = torch.full_like(q, -1)
    # Keys and values are in the cache; the layer takes them from there.
    assert layer.forward(place(2), q, q, q, server.pool, batch_of(call), out) is out
    return out
