"""Caches with centroids: any way of filling them gives the logits of one pass, and every way of generating works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import caches  # noqa: E402
from decoders import LAYERS, SIZES, VOCAB, build, logits, tokens  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DeepseekV2Config,
    DynamicCache,
    Gemma3nTextConfig,
    JetMoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.masking_utils import create_masks_for_generate  # noqa: E402

from openmoba import MobaConfig, complete_pages  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.growing_layer import GrowingLayer  # noqa: E402
from openmoba.hf.layout import Layout  # noqa: E402

BLOCK = 4
SPARSE = MobaConfig(BLOCK, 2)
HYBRID = MobaConfig(BLOCK, 2, full_layers=1)


@torch.no_grad()
def test_a_growing_layer_holds_every_token_however_often_it_grows() -> None:
    layer, states = GrowingLayer(), torch.randn(1, 2, 150, 8)
    for new in states.split(1, dim=2):
        keys, values = layer.update(new, -new)
    assert torch.equal(keys, states)
    assert torch.equal(values, -states)


@pytest.mark.parametrize("settings", [SPARSE, HYBRID, MobaConfig(BLOCK, 1), MobaConfig(1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "unnamed", "static"])
@pytest.mark.parametrize(
    "cuts",
    [[], [BLOCK - 1], [BLOCK], [BLOCK + 1], [17, 2, 3], [20, 18, 5]],
    ids=lambda cuts: "-".join(map(str, cuts)) or "tokens",
)
def test_any_chunking_equals_one_pass(cuts: list[int], kind: str, settings: MobaConfig) -> None:
    caches.check_chunking(configure(build(), settings), kind, cuts, settings.full_layer_indices(LAYERS))


@pytest.mark.parametrize("settings", [SPARSE, HYBRID], ids=["moba", "hybrid"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cuts", [[], [7], [19], [26, 3]], ids=str)
def test_left_padding_in_a_cache(cuts: list[int], kind: str, settings: MobaConfig) -> None:
    caches.check_left_padding(configure(build(), settings), kind, cuts, (33, 21, 8))


def test_padding_between_prompt_and_continuation() -> None:
    """Right-padded prompts leave holes in the cache."""
    model = configure(build(), HYBRID)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, 9:21] = 0
    ids = tokens(2, 33)
    out = caches.in_pieces(model, ids, [21], caches.new_cache("dynamic", model), mask)
    for row in range(2):
        real = mask[row].bool()
        alone = logits(model, ids[row : row + 1, real], use_cache=False)[0]
        torch.testing.assert_close(out[row, real], alone)
    for prompt in (21, 14):
        with pytest.raises(ValueError, match="padding_side to 'left'"):
            caches.in_pieces(model, ids, [prompt], caches.new_cache("static", model), mask)
    with pytest.raises(RuntimeError, match="padding must be on the left"):  # steps wait for no device
        caches.in_pieces(model, ids, [], caches.new_cache("static", model), mask)


def test_crop() -> None:
    caches.check_crop(configure(build(), SPARSE))


def last_token_only(centroids: Tensor, keys: Tensor, lengths: Tensor, starts: Any, new: int, size: int) -> None:
    """`complete_pages`, for a cache whose other pages are known."""
    assert new == 1
    complete_pages(centroids, keys, lengths, starts, new, size)


@pytest.mark.parametrize("how", caches.ROWS)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_a_cache(padded: bool, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages follow their rows; they are not made again."""

    def picked() -> None:
        monkeypatch.setattr("openmoba.hf.growing_layer.complete_pages", last_token_only)
        monkeypatch.setattr("openmoba.hf.fixed_layer.complete_pages", last_token_only)

    caches.check_rows(configure(build(), HYBRID), how, padded, [], picked)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_and_reset(kind: str) -> None:
    caches.check_copies(configure(build(), SPARSE), kind)


def test_a_changed_mask() -> None:
    """Blocks begin elsewhere once the mask hides the first tokens: as in a cache that never had pages."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    cache = caches.new_cache("dynamic", model)
    caches.in_pieces(model, ids[:, :22], [20], cache)
    fresh = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    for t in range(22, 40):
        mask = torch.ones(1, t + 1, dtype=torch.long)
        mask[:, :6] = 0
        kwargs = {"attention_mask": mask, "use_cache": True}
        known = logits(model, ids[:, t : t + 1], past_key_values=cache, **kwargs)
        torch.testing.assert_close(known, logits(model, ids[:, t : t + 1], past_key_values=fresh, **kwargs))


def test_offload_and_prefetch() -> None:
    caches.check_offloading(configure(build(), SPARSE))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_token_reads_its_pages_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of blocks that no head chooses may be anything, once their centroids are known."""
    model, ids = configure(build(), MobaConfig(BLOCK, 1)), tokens(1, 22)
    whole = logits(model, ids, use_cache=False)
    cache = caches.new_cache(kind, model)
    caches.in_pieces(model, ids[:, :21], [21], cache)
    for layer in cache.layers:
        layer.keys[:, :, :20] = layer.values[:, :, :20] = float("nan")
    monkeypatch.delattr("openmoba.hf.kinds.moba_attention")
    out = caches.in_pieces(model, ids[:, 21:], [], cache)
    torch.testing.assert_close(out, whole[:, 21:])


def test_a_loaded_model_gets_pages_by_itself(tmp_path: Any) -> None:
    """Without `configure`, the second forward pass takes over what the first one cached."""
    configure(build(), HYBRID).save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 30)
    for kind in ("dynamic", "static"):
        cache = caches.new_cache(kind, model)
        out = caches.in_pieces(model, ids, [18], cache)
        torch.testing.assert_close(out, logits(model, ids, use_cache=False))
        assert cache.layers[0].block_size == BLOCK


def test_memory_of_the_cache() -> None:
    """At most one percent over keys and values in 16 bits, at block size 128."""
    heads, width, length = 2, 16, 131_072
    layer = GrowingLayer()
    layer.keep_pages(128)
    states = torch.randn(1, heads, length, width, dtype=torch.bfloat16)
    layer.update(states, states)
    layer.pages(layer.keys.transpose(1, 2), Layout.read(None, None, None, (1, length)))
    held = sum(x.numel() * x.element_size() for x in (*layer._stores, layer._centroids))
    assert held <= 1.01 * 2 * states.numel() * states.element_size()


@pytest.mark.parametrize("change", ["settings", "padding"])
def test_a_static_cache_may_miss_tokens_but_not_move(change: str) -> None:
    """Tokens cached without MoBA get their pages later; padding that comes and goes is found out."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    cache = caches.new_cache("static", model)
    caches.in_pieces(model, ids[:, :20], [18], cache)
    if change == "settings":
        reference = DynamicCache(
            [(layer.keys[:, :, :20].clone(), layer.values[:, :, :20].clone()) for layer in cache.layers]
        )
        for each in (cache, reference):
            configure(model, None)
            caches.in_pieces(model, ids[:, 20:29], [], each)
            configure(model, SPARSE)
        known = caches.in_pieces(model, ids[:, 29:], [], cache)
        torch.testing.assert_close(known, caches.in_pieces(model, ids[:, 29:], [], reference))
    else:
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[:, :3] = 0
        with pytest.raises(RuntimeError, match="the padding must stay as it is"):
            logits(model, ids[:, 20:21], attention_mask=mask, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_settings_may_change_while_a_cache_is_filled(kind: str) -> None:
    """Pages belong to a block size; another one starts from the cached keys."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    cache = caches.new_cache(kind, model)
    caches.in_pieces(model, ids[:, :23], [20], cache)
    reference = DynamicCache()
    caches.in_pieces(model, ids[:, :23], [20], reference)
    configure(model, MobaConfig(7, 3))
    expected = logits(model, ids[:, 23:], past_key_values=reference, use_cache=True)
    torch.testing.assert_close(caches.in_pieces(model, ids[:, 23:], [], cache), expected)


@pytest.mark.parametrize("settings", [SPARSE, HYBRID], ids=["moba", "hybrid"])
def test_greedy_generation(settings: MobaConfig) -> None:
    assistant = configure(build(LlamaConfig(**(SIZES | {"num_hidden_layers": 1}))), SPARSE)
    caches.check_generation(configure(build(), settings), assistant)


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
SHARED = {
    "layer_types": ["full_attention"] * LAYERS,
    "num_kv_shared_layers": 1,
    "activation_sparsity_pattern": [0.0] * LAYERS,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
REPEATED = {"kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "entries"),
    [
        (DeepseekV2Config, LATENT | {"n_routed_experts": 2, "first_k_dense_replace": LAYERS}),
        (JetMoeConfig, REPEATED),
        (Gemma3nTextConfig, SHARED),
    ],
    ids=["latent", "repeated", "shared"],
)
def test_keys_that_are_not_those_in_the_cache(config: Any, entries: dict[str, Any]) -> None:
    """Some families make them of what they cache, of latents or by repeating heads; or layers read another one's."""
    model = configure(build(config(**(SIZES | entries))), SPARSE)
    caches.check_generation(model, model)


@pytest.mark.parametrize("config", [Qwen3Config, MistralConfig], ids=lambda c: c.model_type)
def test_masks_by_kind_of_layer(config: Any) -> None:
    """Qwen3 names kinds of layers: with a static cache, generate makes a mask for each before it calls the model."""
    model, ids = configure(build(config(**SIZES, sliding_window=None)), HYBRID), tokens(2, 21)
    ids[1, :6] = 0
    expected = caches.generate(model, ids)
    assert caches.generate(model, ids, cache_implementation="static").equal(expected)
    assert expected[1, 6:].equal(caches.generate(model, ids[1:, 6:])[0])


def test_generation_equals_sdpa_when_all_blocks_are_read() -> None:
    model, ids = build(), tokens(2, 21)
    ids[1, :6] = 0
    static = {"cache_implementation": "static"}
    options = [{}, {"num_beams": 3}, {"do_sample": True}, static, {"num_beams": 3} | static]
    full = []
    for settings in (None, MobaConfig(BLOCK, 16)):
        configure(model, settings)
        for i, option in enumerate(options):
            torch.manual_seed(1)
            out = caches.generate(model, ids, **option)
            if settings is None:
                full.append(out)
            else:
                assert out.equal(full[i]), option


@pytest.mark.parametrize("implementation", [None, "static"])
def test_beams(implementation: str | None) -> None:
    caches.check_beams(configure(build(), HYBRID), implementation)


@pytest.mark.parametrize("cuts", [[10, 10, 10, 10], [24, 16], [23, 17]], ids=str)
@pytest.mark.parametrize("trained", ["q_proj", "k_proj"])
def test_gradients_through_a_cache(cuts: list[int], trained: str) -> None:
    """However short the pieces, and whatever part of the model is trained."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    model.requires_grad_(False)
    weight = getattr(model.model.layers[1].self_attn, trained).weight.requires_grad_()
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), weight)[0]
    cache = DynamicCache(config=model.config)
    parts = [model(piece, past_key_values=cache).logits for piece in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.autograd.grad(torch.cat(parts, 1).square().sum(), weight)[0], expected)


def test_a_static_cache_that_the_prompt_fills() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 24)
    options = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, cache_implementation="static", **options)
    assert out.equal(model.generate(ids, **options))


@pytest.mark.parametrize("graded", [False, True])
def test_a_prompt_of_inference_mode_goes_on_outside_it(graded: bool) -> None:
    """Where gradients are recorded, without the reserve of slots that the prompt had."""
    model, ids = configure(build(), SPARSE), tokens(1, 30)
    model.requires_grad_(False)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :21], past_key_values=cache)
    with torch.set_grad_enabled(graded):
        rest = model(ids[:, 21:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits(model, ids, use_cache=False)[:, 21:])


def test_tokens_after_a_loss_do_not_write_what_its_backward_needs() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 30)
    cache = DynamicCache(config=model.config)
    model(ids[:, :21], past_key_values=cache)
    loss = model(ids[:, 21:], past_key_values=cache).logits.square().sum()
    cache.crop(-5)
    logits(model, ids[:, :3], past_key_values=cache)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_compiled_decoding() -> None:
    caches.check_compiled_decoding(configure(build(), HYBRID), 5, 40, "aot_eager")


def test_compiled_decoding_of_masks_by_kind_of_layer() -> None:
    """As generate does it for Qwen3: the answer is found outside of the graph and read inside."""
    model = configure(build(Qwen3Config(**SIZES)), HYBRID)
    caches.check_compiled_decoding(model, 5, 25, "eager", create_masks_for_generate)
