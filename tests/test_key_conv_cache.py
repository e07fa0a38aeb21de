"""Key convolution with caches: any way of filling them gives the logits of one pass, and the tokens generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_key_conv import ARMS, FULL, HYBRID, PLAIN, convolving

transformers = pytest.importorskip("transformers")

import caches  # noqa: E402
from decoders import LAYERS, SIZES, build, logits, tokens  # noqa: E402
from transformers import DynamicCache, LlamaConfig  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.growing_layer import KEPT  # noqa: E402

KINDS = pytest.mark.parametrize("kind", ["dynamic", "unnamed", "static"])


@KINDS
@ARMS
@pytest.mark.parametrize("cuts", [[], [2, 3], [17, 2, 3], [20, 18, 5]], ids=str)
def test_any_chunking_equals_one_pass(cuts: list[int], settings: MobaConfig, kind: str) -> None:
    caches.check_chunking(convolving(settings), kind, cuts, settings.full_layer_indices(LAYERS))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@ARMS
@pytest.mark.parametrize("cuts", [[], [7], [19], [26, 3]], ids=str)
def test_left_padding_in_a_cache(cuts: list[int], settings: MobaConfig, kind: str) -> None:
    """Rows with fewer tokens than the convolution reaches back among them."""
    caches.check_left_padding(convolving(settings), kind, cuts, (33, 21, 9, 2))


def test_going_on_after_right_padding_is_refused() -> None:
    model, mask = convolving(), torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:12] = 0
    with pytest.raises(ValueError, match="padding_side to 'left'"):
        caches.in_pieces(model, tokens(2, 13), [12], caches.new_cache("dynamic", model), mask)


@ARMS
def test_crop(settings: MobaConfig) -> None:
    caches.check_crop(convolving(settings))


def test_crop_beyond_what_is_kept() -> None:
    """Refused before anything is dropped."""
    config = LlamaConfig(**(SIZES | {"max_position_embeddings": 2 * KEPT}))
    model, ids = convolving(config=config), tokens(1, KEPT + 20)
    cache = caches.new_cache("dynamic", model)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match=f"the last {KEPT} of {KEPT + 20} cached tokens"):
        cache.crop(-KEPT)
    cache.crop(3 - KEPT)
    rest = logits(model, ids[:, 23:], past_key_values=cache)
    torch.testing.assert_close(rest, logits(model, ids, use_cache=False)[:, 23:])


@pytest.mark.parametrize("how", caches.ROWS)
@pytest.mark.parametrize("padded", [False, True])
@ARMS
def test_rows_of_a_cache(settings: MobaConfig, padded: bool, how: str) -> None:
    caches.check_rows(convolving(settings), how, padded, [15], lambda: None)


@KINDS
@ARMS
def test_copies_and_reset(settings: MobaConfig, kind: str) -> None:
    caches.check_copies(convolving(settings), kind)


@ARMS
def test_offload_and_prefetch(settings: MobaConfig) -> None:
    caches.check_offloading(convolving(settings))


@pytest.mark.parametrize("settings", [HYBRID, FULL], ids=["hybrid", "full"])
def test_generation(settings: MobaConfig) -> None:
    caches.check_generation(
        convolving(settings), convolving(settings, LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))
    )


@pytest.mark.parametrize("implementation", [None, "static"])
def test_beams(implementation: str | None) -> None:
    caches.check_beams(convolving(), implementation)


def test_generation_of_a_trained_model() -> None:
    """Trained with it on text that repeats, the model goes on as it was taught; other prompts as without a cache."""
    torch.manual_seed(0)
    model = configure(build(), HYBRID).train()
    text = (torch.arange(64) * 7 % 19 + 3)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert loss < 0.5
    assert all((layer.self_attn.key_conv.weight.abs() > 1e-3).any() for layer in model.model.layers)
    assert caches.generate(model, text[:, :40]).equal(text[:, :54])
    padded = tokens(2, 23)
    padded[1, :17] = 0
    kinds: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 9}]
    for beams in (1, 3):
        expected = caches.generate(model, padded, num_beams=beams, max_new_tokens=9, use_cache=False)
        for options in kinds[: 3 if beams == 1 else 2]:  # transformers cuts no prompts of beams
            assert caches.generate(model, padded, num_beams=beams, max_new_tokens=9, **options).equal(expected), options


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("other", [FULL, MobaConfig(7, 3, key_conv=4)], ids=["full", "blocks"])
def test_settings_may_change_while_a_cache_is_filled(other: MobaConfig, kind: str) -> None:
    """Between MoBA, full attention and other blocks, there and back: raw keys stay, pages are made anew."""
    model, ids = convolving(HYBRID), tokens(1, 40)
    cache, reference = caches.new_cache(kind, model), caches.new_cache("dynamic", model)
    for settings, start, end in ((HYBRID, 0, 14), (other, 14, 26), (HYBRID, 26, 40)):
        configure(model, settings)
        expected = logits(model, ids[:, start:end], past_key_values=reference)
        torch.testing.assert_close(caches.in_pieces(model, ids[:, start:end], [5], cache), expected)


def test_a_projection_that_an_adapter_replaced() -> None:
    """What stands in the place of `k_proj` is convolved, as if its weights were merged."""
    model, ids = convolving(), tokens(1, 23)

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.delta = base, torch.randn_like(base.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + torch.nn.functional.linear(x, self.delta)

    attention = model.model.layers[1].self_attn
    attention.k_proj = Adapted(attention.k_proj)
    adapted = logits(model, ids)
    attention.k_proj.base.weight.data += attention.k_proj.delta
    attention.k_proj = attention.k_proj.base
    torch.testing.assert_close(adapted, logits(model, ids))


@ARMS
def test_gradients_through_a_cache(settings: MobaConfig) -> None:
    model, ids = convolving(settings), tokens(1, 40)
    weights = [layer.self_attn.key_conv.weight for layer in model.model.layers]
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), weights)
    cache = DynamicCache(config=model.config)
    parts = [model(piece, past_key_values=cache).logits for piece in ids.split([9, 1, 2, 28], dim=1)]
    for got, wanted in zip(torch.autograd.grad(torch.cat(parts, 1).square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@KINDS
def test_tokens_that_came_without_it_are_not_passed_over(kind: str) -> None:
    """The next token would be convolved with keys that lie before them."""
    convolution, plain, ids = convolving(), configure(build(), PLAIN), tokens(1, 20)
    cache = caches.new_cache(kind, convolution)
    for model, piece in ((convolution, ids[:, :9]), (plain, ids[:, 9:12])):
        logits(model, piece, past_key_values=cache)
    with pytest.raises(ValueError, match="filled without key convolution"):
        logits(convolution, ids[:, 12:], past_key_values=cache)


def test_caches_that_cannot_serve() -> None:
    """One filled without it, and one of a kind that cannot keep raw keys."""
    model, ids = configure(build(), PLAIN), tokens(1, 20)
    cache = caches.new_cache("dynamic", model)
    logits(model, ids, past_key_values=cache)
    convolution = convolving()
    with pytest.raises(ValueError, match="filled without key convolution"):
        logits(convolution, ids, past_key_values=cache)

    class Another(type(DynamicCache().layer_class_to_replicate())):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="needs a dynamic or static cache, got a Another"):
        logits(convolution, ids, past_key_values=DynamicCache.__bases__[0](layer_class_to_replicate=Another))


def test_compiled_decoding() -> None:
    caches.check_compiled_decoding(convolving(HYBRID), 17, 25, "eager")
