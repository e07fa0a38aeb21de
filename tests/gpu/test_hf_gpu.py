"""Models and caches on a GPU: what only shows there, such as offloading and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from caches import generate, greedy_without_cache, in_pieces  # noqa: E402
from decoders import build, logits, tokens  # noqa: E402
from transformers import CompileConfig, DynamicCache, StaticCache  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.lab.model.build import set_attention  # noqa: E402

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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "layers"])
@pytest.mark.parametrize("settings", [None, SPARSE, HYBRID], ids=["full", "moba", "hybrid"])
def test_a_training_step_waits_for_nothing(settings: MobaConfig | None, compiled: bool, no_waiting: Any) -> None:
    """Whole rows, and packed ones whose boundaries are given; everything is compiled and tuned in the first steps."""
    torch._dynamo.reset()
    model = build().cuda().train()
    set_attention(model, settings)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    ids = tokens(2, 256).cuda()
    ends = torch.tensor([0, 100, 256, 512], dtype=torch.int32, device="cuda")

    def step() -> None:
        for call in ({}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}):
            with torch.autocast("cuda", torch.bfloat16):
                model.model(ids, use_cache=False, **call).last_hidden_state.float().square().mean().backward()

    for _ in range(3):
        step()
    with no_waiting():
        step()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "layers"])
@pytest.mark.parametrize("settings", [None, SPARSE, HYBRID], ids=["full", "moba", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_separate(dtype: torch.dtype, settings: MobaConfig | None, compiled: bool) -> None:
    """As close to the fp64 hidden states of the sequences apart as these are in the same precision."""
    torch._dynamo.reset()
    model = build().cuda().to(dtype)
    set_attention(model, settings)
    ids, lengths = tokens(1, 300).cuda(), [100, 7, 193]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()

    def apart(model: Any) -> torch.Tensor:
        return torch.cat([logits(model, part, use_cache=False) for part in ids.split(lengths, 1)], 1)

    separate = apart(model)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    oracle = apart(model.double())
    error, allowed = ((x.double() - oracle).abs().mean() for x in (packed, separate))
    assert error <= 2 * allowed + 1e-5
