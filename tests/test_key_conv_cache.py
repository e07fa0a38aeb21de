"""Key convolution with caches: any way of filling them gives the logits of one pass, and the tokens generated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_hf_generation import generate, greedy_without_cache, in_pieces, new_cache
from test_hf_models import LAYERS, SIZES, build, logits, tokens
from test_key_conv import ARMS, FULL, HYBRID, PLAIN, convolving
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.cache import DynamicPagedLayer, StaticPagedLayer  # noqa: E402
from openmoba.hf.raw_keys import KEPT  # noqa: E402

KINDS = pytest.mark.parametrize("kind", ["dynamic", "unnamed", "static"])


@KINDS
@ARMS
@pytest.mark.parametrize("cuts", [[], [2, 3], [17, 2, 3], [20, 18, 5]], ids=str)
def test_any_chunking_equals_one_pass(cuts: list[int], settings: MobaConfig, kind: str) -> None:
    model, ids = convolving(settings), tokens(2, 47)
    cache = new_cache(kind, model)
    torch.testing.assert_close(in_pieces(model, ids, cuts, cache), logits(model, ids, use_cache=False))
    paged = [isinstance(layer, DynamicPagedLayer | StaticPagedLayer) for layer in cache.layers]
    assert paged == [i not in settings.full_layer_indices(LAYERS) for i in range(LAYERS)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@ARMS
@pytest.mark.parametrize("cuts", [[], [7], [19], [26, 3]], ids=str)
def test_left_padding_in_a_cache(cuts: list[int], settings: MobaConfig, kind: str) -> None:
    """Rows with fewer tokens than the convolution reaches back among them."""
    model = convolving(settings)
    rows = [tokens(1, n, seed=n)[0] for n in (33, 21, 9, 2)]
    mask = torch.stack([torch.arange(33) >= 33 - len(row) for row in rows]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(rows)
    padded = in_pieces(model, ids, cuts, new_cache(kind, model), mask)
    for row, alone in enumerate(rows):
        torch.testing.assert_close(padded[row, -len(alone) :], logits(model, alone[None], use_cache=False)[0])


def test_going_on_after_right_padding_is_refused() -> None:
    model, mask = convolving(), torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:12] = 0
    with pytest.raises(ValueError, match="padding_side to 'left'"):
        in_pieces(model, tokens(2, 13), [12], new_cache("dynamic", model), mask)


@ARMS
def test_crop(settings: MobaConfig) -> None:
    model, ids = convolving(settings), tokens(1, 40)
    whole = logits(model, ids, use_cache=False)
    cache = new_cache("dynamic", model)
    in_pieces(model, ids[:, :21], [19], cache)
    for wrong, removed in ((tokens(1, 7, seed=9), 9), (tokens(1, 3, seed=8), 3), (tokens(1, 1, seed=7), 6)):
        in_pieces(model, wrong, [wrong.shape[1]], cache)
        cache.crop(-removed)
    done = cache.get_seq_length()
    torch.testing.assert_close(in_pieces(model, ids[:, done:], [], cache), whole[:, done:])
    cache.crop(-40)
    torch.testing.assert_close(in_pieces(model, ids, [40], cache), whole)


def test_crop_beyond_what_is_kept() -> None:
    """Refused before anything is dropped."""
    config = LlamaConfig(**(SIZES | {"max_position_embeddings": 2 * KEPT}))
    model, ids = convolving(config=config), tokens(1, KEPT + 20)
    cache = new_cache("dynamic", model)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match=f"the last {KEPT} of {KEPT + 20} cached tokens"):
        cache.crop(-KEPT)
    cache.crop(3 - KEPT)
    rest = logits(model, ids[:, 23:], past_key_values=cache)
    torch.testing.assert_close(rest, logits(model, ids, use_cache=False)[:, 23:])


@pytest.mark.parametrize("how", ["reorder", "static reorder", "repeat", "select"])
@pytest.mark.parametrize("padded", [False, True])
@ARMS
def test_rows_of_a_cache(settings: MobaConfig, padded: bool, how: str) -> None:
    model, ids = convolving(settings), tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :6] = mask[2, :20] = 0 if padded else 1
    cache = new_cache("static" if "static" in how else "dynamic", model)
    in_pieces(model, ids[:, :22], [20], cache, mask)
    if "reorder" in how:
        index = torch.tensor([2, 0, 0])
        cache.reorder_cache(index)
    elif how == "repeat":
        index = torch.tensor([0, 0, 1, 1, 2, 2])
        cache.batch_repeat_interleave(2)
    else:
        index = torch.tensor([2, 1])
        cache.batch_select_indices(index)
    picked = torch.cat([ids[index, :22], tokens(len(index), 18, seed=5)], 1)
    seen = mask[index]
    positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, 22:]
    kwargs = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    out = logits(model, picked[:, 22:], **kwargs)
    for row in range(len(index)):
        alone = logits(model, picked[row : row + 1, seen[row].bool()], use_cache=False)[0, -18:]
        torch.testing.assert_close(out[row], alone)


@KINDS
@ARMS
def test_copies_and_reset(settings: MobaConfig, kind: str) -> None:
    """A cached prompt, copied for each continuation, stays what it was; a cache that was reset begins anew."""
    model, prompt = convolving(settings), tokens(1, 21)
    cache = new_cache(kind, model)
    in_pieces(model, prompt, [19], cache)
    for seed in (1, 2):
        tail = tokens(1, 12, seed=seed)
        out = in_pieces(model, tail, [], copy.deepcopy(cache))
        torch.testing.assert_close(out, logits(model, torch.cat([prompt, tail], 1), use_cache=False)[:, 21:])
    cache.reset()
    again = in_pieces(model, tail, [7], cache)
    torch.testing.assert_close(again, logits(model, tail, use_cache=False))


@ARMS
def test_offload_and_prefetch(settings: MobaConfig) -> None:
    model, ids = convolving(settings), tokens(1, 30)
    cache = new_cache("dynamic", model)
    first = in_pieces(model, ids[:, :18], [15], cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    rest = in_pieces(model, ids[:, 18:], [], cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), logits(model, ids, use_cache=False))


@pytest.mark.parametrize("settings", [HYBRID, FULL], ids=["hybrid", "full"])
def test_generation(settings: MobaConfig) -> None:
    """Greedy tokens are those without a cache, in whatever way they are generated."""
    model, ids = convolving(settings), tokens(1, 21)
    expected = greedy_without_cache(model, ids, 14)
    assistant = convolving(settings, LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))
    for options in (
        {},
        {"prefill_chunk_size": 6},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": assistant},
    ):
        assert generate(model, ids, **options).equal(expected), options
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    batch = torch.cat([left, tokens(1, 26, seed=4)])
    for implementation in (None, "static"):
        both = generate(model, batch, cache_implementation=implementation)
        assert both[0, 5:].equal(expected[0])
        assert both[1].equal(generate(model, batch[1:])[0])


@pytest.mark.parametrize("implementation", [None, "static"])
def test_beams(implementation: str | None) -> None:
    model, ids = convolving(), tokens(1, 21)
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    scored = generate(model, ids, cache_implementation=implementation, **options)
    for sequence, score in zip(scored.sequences, scored.sequences_scores, strict=True):
        log_p = logits(model, sequence[None, :-1], use_cache=False)[0, 20:].log_softmax(-1)
        total = log_p.gather(-1, sequence[21:, None]).sum()
        torch.testing.assert_close(score, total / 14, rtol=1e-4, atol=1e-4)


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
    assert generate(model, text[:, :40]).equal(text[:, :54])
    padded = tokens(2, 23)
    padded[1, :17] = 0
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 9}]
    for beams in (1, 3):
        expected = generate(model, padded, num_beams=beams, max_new_tokens=9, use_cache=False)
        for options in caches[: 3 if beams == 1 else 2]:  # transformers cuts no prompts of beams
            assert generate(model, padded, num_beams=beams, max_new_tokens=9, **options).equal(expected), options


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("other", [FULL, MobaConfig(7, 3, key_conv=4)], ids=["full", "blocks"])
def test_settings_may_change_while_a_cache_is_filled(other: MobaConfig, kind: str) -> None:
    """Between MoBA, full attention and other blocks, there and back: raw keys stay, pages are made anew."""
    model, ids = convolving(HYBRID), tokens(1, 40)
    cache, reference = new_cache(kind, model), new_cache("dynamic", model)
    for settings, start, end in ((HYBRID, 0, 14), (other, 14, 26), (HYBRID, 26, 40)):
        configure(model, settings)
        expected = logits(model, ids[:, start:end], past_key_values=reference)
        torch.testing.assert_close(in_pieces(model, ids[:, start:end], [5], cache), expected)


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


def test_caches_that_cannot_serve() -> None:
    """One filled without it, and one of a kind that cannot keep raw keys."""
    model, ids = configure(build(), PLAIN), tokens(1, 20)
    cache = new_cache("dynamic", model)
    logits(model, ids, past_key_values=cache)
    convolution = convolving()
    with pytest.raises(ValueError, match="filled without key convolution"):
        logits(convolution, ids, past_key_values=cache)

    class Another(type(DynamicCache().layer_class_to_replicate())):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="needs a dynamic or static cache, got a Another"):
        logits(convolution, ids, past_key_values=DynamicCache.__bases__[0](layer_class_to_replicate=Another))


def test_compiled_decoding() -> None:
    """A static cache keeps the decoding step one graph, whatever the position."""
    torch._dynamo.reset()
    model, ids = convolving(HYBRID), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = new_cache("static", model)
    eager = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits(model, ids[:, :19], attention_mask=mask[:, :19], position_ids=positions[:, :19], past_key_values=cache)
    graphs = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=graphs, fullgraph=True)
    for t in range(19, 25):
        padding = torch.nn.functional.pad(mask[:, : t + 1], (0, 64 - t - 1))
        out = logits(
            step, ids[:, t : t + 1], attention_mask=padding, position_ids=positions[:, t : t + 1], past_key_values=cache
        )
        torch.testing.assert_close(out[:, 0], eager[:, t])
    assert graphs.frame_count == 1
