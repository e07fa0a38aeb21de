"""Caches with centroids: any way of filling them gives the logits of one pass, and every way of generating works."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_hf_models import LAYERS, SIZES, build, logits, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.cache import DynamicPagedLayer, StaticPagedLayer  # noqa: E402
from openmoba.ops.pages import complete_pages  # noqa: E402

BLOCK = 4
SPARSE = MobaConfig(BLOCK, 2)
HYBRID = MobaConfig(BLOCK, 2, full_layers=1)


def new_cache(kind: str, model: Any, length: int = 64) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


def in_pieces(model: Any, ids: Tensor, cuts: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of `ids` fed in pieces of the given lengths, then token by token."""
    pieces = [*cuts, *[1] * (ids.shape[1] - sum(cuts))]
    done, parts = 0, []
    for piece in ids.split(pieces, dim=1):
        end = done + piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, done:end]
        parts.append(
            logits(model, piece, past_key_values=cache, use_cache=True, attention_mask=seen, position_ids=positions)
        )
        done = end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("settings", [SPARSE, HYBRID, MobaConfig(BLOCK, 1), MobaConfig(1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "unnamed", "static"])
@pytest.mark.parametrize(
    "cuts",
    [[], [BLOCK - 1], [BLOCK], [BLOCK + 1], [17, 2, 3], [20, 18, 5]],
    ids=lambda cuts: "-".join(map(str, cuts)) or "tokens",
)
def test_any_chunking_equals_one_pass(cuts: list[int], kind: str, settings: MobaConfig) -> None:
    model, ids = configure(build(), settings), tokens(2, 47)
    whole = logits(model, ids, use_cache=False)
    cache = new_cache(kind, model)
    torch.testing.assert_close(in_pieces(model, ids, cuts, cache), whole)
    kinds = [isinstance(layer, DynamicPagedLayer | StaticPagedLayer) for layer in cache.layers]
    assert kinds == [i not in settings.full_layer_indices(LAYERS) for i in range(LAYERS)]


@pytest.mark.parametrize("settings", [SPARSE, HYBRID], ids=["moba", "hybrid"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cuts", [[], [7], [19], [26, 3]], ids=str)
def test_left_padding_in_a_cache(cuts: list[int], kind: str, settings: MobaConfig) -> None:
    model = configure(build(), settings)
    rows = [tokens(1, n, seed=n)[0] for n in (33, 21, 8)]
    mask = torch.stack([torch.arange(33) >= 33 - len(row) for row in rows]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(rows)
    padded = in_pieces(model, ids, cuts, new_cache(kind, model), mask)
    for row, alone in enumerate(rows):
        torch.testing.assert_close(padded[row, -len(alone) :], logits(model, alone[None], use_cache=False)[0])


def test_padding_between_prompt_and_continuation() -> None:
    """Right-padded prompts leave holes in the cache."""
    model = configure(build(), HYBRID)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, 9:21] = 0
    ids = tokens(2, 33)
    out = in_pieces(model, ids, [21], new_cache("dynamic", model), mask)
    for row in range(2):
        real = mask[row].bool()
        alone = logits(model, ids[row : row + 1, real], use_cache=False)[0]
        torch.testing.assert_close(out[row, real], alone)
    for prompt in (21, 14):
        with pytest.raises(ValueError, match="padding_side to 'left'"):
            in_pieces(model, ids, [prompt], new_cache("static", model), mask)
    with pytest.raises(RuntimeError, match="padding must be on the left"):  # steps wait for no device
        in_pieces(model, ids, [], new_cache("static", model), mask)


def test_crop() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    whole = logits(model, ids, use_cache=False)
    cache = new_cache("dynamic", model)
    in_pieces(model, ids[:, :21], [19], cache)
    for wrong, removed in ((tokens(1, 7, seed=9), 9), (tokens(1, 3, seed=8), 3), (tokens(1, 1, seed=7), 6)):
        in_pieces(model, wrong, [wrong.shape[1]], cache)
        cache.crop(-removed)
    done = cache.get_seq_length()
    assert done == 21 - 2 - 5
    torch.testing.assert_close(in_pieces(model, ids[:, done:], [], cache), whole[:, done:])


def last_token_only(centroids: Tensor, keys: Tensor, lengths: Tensor, starts: Any, new: int, size: int) -> None:
    """`complete_pages`, for a cache whose other pages are known."""
    assert new == 1
    complete_pages(centroids, keys, lengths, starts, new, size)


@pytest.mark.parametrize("how", ["reorder", "static reorder", "repeat", "select"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_a_cache(padded: bool, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages follow their rows; they are not made again."""
    model, ids = configure(build(), HYBRID), tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :6] = mask[2, :13] = 0 if padded else 1
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
    monkeypatch.setattr("openmoba.hf.cache.complete_pages", last_token_only)
    tail = tokens(len(index), 18, seed=5)
    picked = torch.cat([ids[index, :22], tail], 1)
    out = []
    for t in range(22, 40):
        seen = mask[index, : t + 1]
        positions = (seen.cumsum(-1) - 1)[:, -1:]
        kwargs = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        out.append(logits(model, picked[:, t : t + 1], **kwargs))
    for row in range(len(index)):
        real = mask[index[row]].bool()
        alone = logits(model, picked[row : row + 1, real], use_cache=False)[0, -18:]
        torch.testing.assert_close(torch.cat(out, 1)[row], alone)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_of_a_prompt(kind: str) -> None:
    """A cached prompt, copied for each continuation, stays what it was."""
    model, prompt = configure(build(), HYBRID), tokens(1, 21)
    cache = new_cache(kind, model)
    in_pieces(model, prompt, [19], cache)
    for seed in (1, 2):
        tail = tokens(1, 12, seed=seed)
        out = in_pieces(model, tail, [], copy.deepcopy(cache))
        whole = logits(model, torch.cat([prompt, tail], 1), use_cache=False)
        torch.testing.assert_close(out, whole[:, 21:])


def test_a_changed_mask() -> None:
    """Blocks begin elsewhere once the mask hides the first tokens: as in a cache that never had pages."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    cache = new_cache("dynamic", model)
    in_pieces(model, ids[:, :22], [20], cache)
    fresh = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    for t in range(22, 40):
        mask = torch.ones(1, t + 1, dtype=torch.long)
        mask[:, :6] = 0
        kwargs = {"attention_mask": mask, "use_cache": True}
        known = logits(model, ids[:, t : t + 1], past_key_values=cache, **kwargs)
        torch.testing.assert_close(known, logits(model, ids[:, t : t + 1], past_key_values=fresh, **kwargs))


def test_offload_and_prefetch() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 30)
    cache = new_cache("dynamic", model)
    first = in_pieces(model, ids[:, :18], [15], cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    rest = in_pieces(model, ids[:, 18:], [], cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), logits(model, ids, use_cache=False))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_token_reads_its_pages_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of blocks that no head chooses may be anything, once their centroids are known."""
    model, ids = configure(build(), MobaConfig(BLOCK, 1)), tokens(1, 22)
    whole = logits(model, ids, use_cache=False)
    cache = new_cache(kind, model)
    in_pieces(model, ids[:, :21], [21], cache)
    for layer in cache.layers:
        layer.keys[:, :, :20] = layer.values[:, :, :20] = float("nan")
    monkeypatch.delattr("openmoba.hf.attention.moba_attention")
    out = in_pieces(model, ids[:, 21:], [], cache)
    torch.testing.assert_close(out, whole[:, 21:])


def test_a_loaded_model_gets_pages_by_itself(tmp_path: Any) -> None:
    """Without `configure`, the second forward pass takes over what the first one cached."""
    configure(build(), HYBRID).save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 30)
    for kind in ("dynamic", "static"):
        cache = new_cache(kind, model)
        out = in_pieces(model, ids, [18], cache)
        torch.testing.assert_close(out, logits(model, ids, use_cache=False))
        assert isinstance(cache.layers[0], DynamicPagedLayer | StaticPagedLayer)


def test_memory_of_the_cache() -> None:
    """At most one percent over keys and values in 16 bits, at block size 128."""
    heads, width, length = 2, 16, 131_072
    layer = DynamicPagedLayer(block_size=128)
    states = torch.randn(1, heads, length, width, dtype=torch.bfloat16)
    layer.update(states, states)
    alignment = layer.align(None, states.transpose(1, 2))
    layer.pages(layer.keys.transpose(1, 2), alignment)
    held = sum(x.numel() * x.element_size() for x in (*layer._stores, layer._centroids))
    assert held <= 1.01 * 2 * states.numel() * states.element_size()


@pytest.mark.parametrize("change", ["settings", "padding"])
def test_a_static_cache_may_miss_tokens_but_not_move(change: str) -> None:
    """Tokens cached without MoBA get their pages later; padding that comes and goes is found out."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    cache = new_cache("static", model)
    in_pieces(model, ids[:, :20], [18], cache)
    if change == "settings":
        reference = DynamicCache(
            [(layer.keys[:, :, :20].clone(), layer.values[:, :, :20].clone()) for layer in cache.layers]
        )
        for each in (cache, reference):
            configure(model, None)
            in_pieces(model, ids[:, 20:29], [], each)
            configure(model, SPARSE)
        known = in_pieces(model, ids[:, 29:], [], cache)
        torch.testing.assert_close(known, in_pieces(model, ids[:, 29:], [], reference))
    else:
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[:, :3] = 0
        with pytest.raises(RuntimeError, match="the padding must stay as it is"):
            logits(model, ids[:, 20:21], attention_mask=mask, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_settings_may_change_while_a_cache_is_filled(kind: str) -> None:
    """Pages belong to a block size; another one starts from the cached keys."""
    model, ids = configure(build(), SPARSE), tokens(1, 40)
    cache = new_cache(kind, model)
    in_pieces(model, ids[:, :23], [20], cache)
    reference = DynamicCache()
    in_pieces(model, ids[:, :23], [20], reference)
    configure(model, MobaConfig(7, 3))
    expected = logits(model, ids[:, 23:], past_key_values=reference, use_cache=True)
    torch.testing.assert_close(in_pieces(model, ids[:, 23:], [], cache), expected)


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = (ids != 0).long()
    return model.generate(ids, **(options | kwargs))


def greedy_without_cache(model: Any, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("settings", [SPARSE, HYBRID], ids=["moba", "hybrid"])
def test_greedy_generation(settings: MobaConfig) -> None:
    model, ids = configure(build(), settings), tokens(1, 21)
    expected = greedy_without_cache(model, ids, 14)
    assert generate(model, ids).equal(expected)
    assert generate(model, ids, prefill_chunk_size=6).equal(expected)
    assert generate(model, ids, cache_implementation="static").equal(expected)
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    batch = torch.cat([left, tokens(1, 26, seed=4)])
    for implementation in (None, "static"):
        both = generate(model, batch, cache_implementation=implementation)
        assert both[0, 5:].equal(expected[0])
        assert both[1].equal(generate(model, batch[1:])[0])


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
            out = generate(model, ids, **option)
            if settings is None:
                full.append(out)
            else:
                assert out.equal(full[i]), option


def test_beams_and_assistance() -> None:
    model, ids = configure(build(), HYBRID), tokens(1, 21)
    scored = generate(model, ids, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    for sequence, score in zip(scored.sequences, scored.sequences_scores, strict=True):
        log_p = logits(model, sequence[None, :-1], use_cache=False)[0, 20:].log_softmax(-1)
        total = log_p.gather(-1, sequence[21:, None]).sum()
        torch.testing.assert_close(score, total / 14, rtol=1e-4, atol=1e-4)
    assistant = configure(build(LlamaConfig(**(SIZES | {"num_hidden_layers": 1}))), SPARSE)
    greedy = generate(model, ids)
    assert generate(model, ids, assistant_model=assistant).equal(greedy)
    assert generate(model, ids, prompt_lookup_num_tokens=3).equal(greedy)


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


def test_a_prompt_of_inference_mode_goes_on_outside_it() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 30)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :21], past_key_values=cache)
    rest = logits(model, ids[:, 21:], past_key_values=cache)
    torch.testing.assert_close(rest, logits(model, ids, use_cache=False)[:, 21:])


def test_compiled_decoding() -> None:
    """A static cache keeps the decoding step one graph, whatever the position."""
    torch._dynamo.reset()
    model, ids = configure(build(), HYBRID), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = new_cache("static", model)
    eager = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits(model, ids[:, :19], attention_mask=mask[:, :19], position_ids=positions[:, :19], past_key_values=cache)
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=graphs, fullgraph=True)
    for t in range(19, 40):
        padding = torch.nn.functional.pad(mask[:, : t + 1], (0, 64 - t - 1))
        out = logits(
            step, ids[:, t : t + 1], attention_mask=padding, position_ids=positions[:, t : t + 1], past_key_values=cache
        )
        torch.testing.assert_close(out[:, 0], eager[:, t])
    assert graphs.frame_count == 1
