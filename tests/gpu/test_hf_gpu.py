"""Models and caches on a GPU: what only shows there, such as offloading and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_generation import generate, greedy_without_cache, in_pieces
from test_hf_models import build, logits, tokens

transformers = pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache, StaticCache  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPARSE = MobaConfig(16, 2)
HYBRID = MobaConfig(16, 2, full_layers=1)


@pytest.mark.parametrize("settings", [SPARSE, HYBRID], ids=["moba", "hybrid"])
@pytest.mark.parametrize("implementation", [None, "offloaded", "static"])
def test_generation(implementation: str | None, settings: MobaConfig) -> None:
    """The static cache decodes in CUDA graphs, as transformers chooses by itself."""
    model, ids = configure(build().cuda(), settings), tokens(1, 90).cuda()
    expected = greedy_without_cache(model, ids, 14)
    assert generate(model, ids, cache_implementation=implementation).equal(expected)
    left = torch.cat([torch.zeros(1, 21, dtype=torch.long, device="cuda"), ids], 1)
    batch = torch.cat([left, tokens(1, 111, seed=4).cuda()])
    assert generate(model, batch, cache_implementation=implementation)[0, 21:].equal(expected[0])


def test_static_decoding_in_one_cuda_graph() -> None:
    model, ids = configure(build().cuda(), HYBRID), tokens(2, 70).cuda()
    options: dict[str, Any] = {"cache_implementation": "static"}
    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead")
    eager = generate(model, ids, disable_compile=True, **options)
    assert generate(model, ids, compile_config=compiled, **options).equal(eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_then_tokens_equal_one_pass(kind: str, dtype: torch.dtype) -> None:
    """In 16 bits, as close to the fp64 logits as one pass is."""
    model, ids = configure(build().cuda().to(dtype), HYBRID), tokens(2, 120).cuda()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=160)
    pieces = in_pieces(model, ids, [50, 33, 9], cache, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    oracle = logits(model.double(), ids, attention_mask=mask, position_ids=positions, use_cache=False)
    real = mask.bool()
    error, allowed = ((x.double() - oracle)[real].abs().mean() for x in (pieces, whole))
    assert error <= 2 * allowed + 1e-5
