"""Ways of filling a cache and of generating, and what holds for every model and every kind of cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from decoders import logits, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache


def new_cache(kind: str, model: Any, length: int = 64) -> Any:
    """An empty cache; an "unnamed" one learns of its layers as they come."""
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
        positions = None if mask is None else positions_under(mask)[:, done:end]
        parts.append(
            logits(model, piece, past_key_values=cache, use_cache=True, attention_mask=seen, position_ids=positions)
        )
        done = end
    return torch.cat(parts, 1)


def positions_under(mask: Tensor) -> Tensor:
    """Positions counted from each row's first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = (ids != 0).long()
    return model.generate(ids, **(options | kwargs))


def greedy_without_cache(model: Any, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids


def check_chunking(model: Any, kind: str, cuts: list[int], full: frozenset[int]) -> None:
    """Any way of filling gives the logits of one pass; layers that are not full keep pages."""
    ids, cache = tokens(2, 47), new_cache(kind, model)
    torch.testing.assert_close(in_pieces(model, ids, cuts, cache), logits(model, ids, use_cache=False))
    paged = [getattr(layer, "block_size", None) is not None for layer in cache.layers]
    assert paged == [i not in full for i in range(len(paged))]


def check_left_padding(model: Any, kind: str, cuts: list[int], lengths: tuple[int, ...]) -> None:
    """Rows of these lengths are as alone."""
    rows, most = [tokens(1, n, seed=n)[0] for n in lengths], max(lengths)
    mask = torch.stack([torch.arange(most) >= most - n for n in lengths]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(rows)
    padded = in_pieces(model, ids, cuts, new_cache(kind, model), mask)
    for row, alone in enumerate(rows):
        torch.testing.assert_close(padded[row, -len(alone) :], logits(model, alone[None], use_cache=False)[0])


def check_crop(model: Any) -> None:
    """What was dropped, one token or several, in a block or across blocks, is as if it had never been."""
    ids, cache = tokens(1, 40), new_cache("dynamic", model)
    whole = logits(model, ids, use_cache=False)
    in_pieces(model, ids[:, :21], [19], cache)
    for wrong, removed in ((tokens(1, 7, seed=9), 9), (tokens(1, 3, seed=8), 3), (tokens(1, 1, seed=7), 6)):
        in_pieces(model, wrong, [wrong.shape[1]], cache)
        cache.crop(-removed)
    done = cache.get_seq_length()
    assert done == 21 - 2 - 5
    torch.testing.assert_close(in_pieces(model, ids[:, done:], [], cache), whole[:, done:])
    cache.crop(-40)
    torch.testing.assert_close(in_pieces(model, ids, [40], cache), whole)


ROWS = ["reorder", "static reorder", "repeat", "select"]


def check_rows(model: Any, how: str, padded: bool, cuts: list[int], picked: Callable[[], None]) -> None:
    """Rows that are picked from a cache, one of `ROWS`, go on as alone; `picked` is called in between."""
    ids = tokens(3, 40)
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
    picked()
    ids, seen = torch.cat([ids[index, :22], tokens(len(index), 18, seed=5)], 1), mask[index]
    done, out = 22, []
    for piece in ids[:, 22:].split([*cuts, *[1] * (18 - sum(cuts))], 1):
        end = done + piece.shape[1]
        call = {"attention_mask": seen[:, :end], "position_ids": positions_under(seen)[:, done:end]}
        out.append(logits(model, piece, past_key_values=cache, use_cache=True, **call))
        done = end
    for row in range(len(index)):
        alone = logits(model, ids[row : row + 1, seen[row].bool()], use_cache=False)[0, -18:]
        torch.testing.assert_close(torch.cat(out, 1)[row], alone)


def check_copies(model: Any, kind: str) -> None:
    """A cached prompt, copied for each continuation, stays what it was; a cache that was reset begins anew."""
    prompt, cache = tokens(1, 21), new_cache(kind, model)
    in_pieces(model, prompt, [19], cache)
    for seed in (1, 2):
        tail = tokens(1, 12, seed=seed)
        out = in_pieces(model, tail, [], copy.deepcopy(cache))
        torch.testing.assert_close(out, logits(model, torch.cat([prompt, tail], 1), use_cache=False)[:, 21:])
    cache.reset()
    again = in_pieces(model, tail, [7], cache)
    torch.testing.assert_close(again, logits(model, tail, use_cache=False))


def check_offloading(model: Any) -> None:
    """A cache that went to the CPU and back is what it was."""
    ids, cache = tokens(1, 30), new_cache("dynamic", model)
    first = in_pieces(model, ids[:, :18], [15], cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    rest = in_pieces(model, ids[:, 18:], [], cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), logits(model, ids, use_cache=False))


def check_generation(model: Any, assistant: Any) -> None:
    """Greedy tokens are those without a cache, in whatever way they are generated, padded too."""
    ids = tokens(1, 21)
    expected = greedy_without_cache(model, ids, 14)
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


def check_beams(model: Any, implementation: str | None) -> None:
    """The score of every beam is that of its tokens in one pass."""
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    scored: Any = generate(model, tokens(1, 21), cache_implementation=implementation, **options)
    for sequence, score in zip(scored.sequences, scored.sequences_scores, strict=True):
        log_p = logits(model, sequence[None, :-1], use_cache=False)[0, 20:].log_softmax(-1)
        total = log_p.gather(-1, sequence[21:, None]).sum()
        torch.testing.assert_close(score, total / 14, rtol=1e-4, atol=1e-4)


def check_compiled_decoding(model: Any, padding: int, end: int, backend: str, masks: Any = None) -> None:
    """A static cache keeps the decoding step one graph without a break, whatever the position up to `end`.

    `masks` makes the masks outside of the graph, as `transformers.masking_utils.create_masks_for_generate` does.
    """
    torch._dynamo.reset()
    ids, cache, length = tokens(2, end), new_cache("static", model), 64
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = positions_under(mask)
    eager = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits(model, ids[:, :19], attention_mask=mask[:, :19], position_ids=positions[:, :19], past_key_values=cache)
    graphs = CompileCounterWithBackend(backend)
    step = torch.compile(model, backend=graphs, fullgraph=True)
    for t in range(19, end):
        seen = torch.nn.functional.pad(mask[:, : t + 1], (0, length - t - 1))
        if masks is not None:
            embedded = model.get_input_embeddings()(ids[:, t : t + 1])
            seen = masks(model.config, embedded, seen, cache, positions[:, t : t + 1])
        call = {"attention_mask": seen, "position_ids": positions[:, t : t + 1], "past_key_values": cache}
        torch.testing.assert_close(logits(step, ids[:, t : t + 1], **call)[:, 0], eager[:, t])
    assert graphs.frame_count == 1
