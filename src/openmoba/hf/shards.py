"""Batches and attention layers of models whose sequences lie over several processes (`openmoba.parallel`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from openmoba.hf.find_layout import boundaries_of_whole
from openmoba.hf.kinds import Kind
from openmoba.hf.layout import Layout, Sequences
from openmoba.hf.support import key_value_heads
from openmoba.parallel import Sharding, key_convolution, over_ranks
from openmoba.parallel.alike import different
from openmoba.parallel.collectives import group_of

IGNORED = -100
"""Label of a position without loss, as transformers has it."""

_SPLIT = {"input_ids": 0, "position_ids": 0, "labels": IGNORED, "shift_labels": IGNORED}
"""Inputs `[batch, tokens]` that every rank gets its part of, and what pads them."""
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_COMPARED = (*_SPLIT, "attention_mask", "cu_seq_lens_q")
"""Inputs that every rank has to be given alike; the others follow from them, or are none that can be split."""

# B batch, T tokens of the whole, S of a shard, H heads, D head width

Inputs = dict[str, Any]


def shard_inputs(inputs: Inputs, group: Any, config: Any) -> tuple[Sharding, Inputs]:
    """Cut a batch of whole sequences for this rank; every rank of the group calls this, with the same batch.

    That it is the same is made sure of: ranks tell each other a few sums over their batches, which the host waits for.
    Labels are shifted first, positions are those of the whole, and where packed or padded sequences begin is found in
    the whole. Such rows lie behind each other in one row from then on; padding is a sequence of its own there.

    Args:
        inputs: what a model of transformers takes: `input_ids`, and if there are `labels` or `shift_labels`,
            `position_ids`, a 2-D `attention_mask`, `cu_seq_lens_q` and `cu_seq_lens_k`.
        group: as in `openmoba.parallel.Sharding.over`.
        config: the model's.

    Returns:
        The sharding, and this rank's inputs; both for `model(**inputs)` within `openmoba.parallel.sharded(sharding)`.

    Raises:
        ValueError: ranks were given different batches, in all of them; an input that cannot be split, padding between
            the tokens of a sequence, or a model whose loss is not a sum over labels.
    """
    inputs = dict(inputs)
    check_loss(config)
    _check_same(inputs, group)
    tokens_BT = inputs.get("input_ids")
    if not isinstance(tokens_BT, Tensor) or tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
        raise ValueError(
            f"a batch is split by its input_ids [batch, tokens], got {getattr(tokens_BT, 'shape', tokens_BT)!r}; give "
            "token ids, not embeddings"
        )
    mask = inputs.pop("attention_mask", None)
    _check(inputs)
    if "shift_labels" not in inputs and inputs.get("labels") is not None:
        inputs["shift_labels"] = pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    if inputs.get("shift_labels") is not None:
        inputs["labels"] = inputs["shift_labels"]  # transformers asks for both, and reads the shifted ones
    begins = _boundaries(inputs, mask)
    for name in _BOUNDARIES:
        inputs.pop(name, None)
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
    inputs["position_ids"] = inputs["position_ids"].expand(tokens_BT.shape)
    split = {name: inputs[name] for name in _SPLIT if inputs.get(name) is not None}
    if begins is not None:
        split = {name: x.reshape(1, -1) for name, x in split.items()}
    heads, kv_heads = config.num_attention_heads, key_value_heads(config)
    sharding = Sharding.balanced(group, split["input_ids"].shape[1], heads, kv_heads, cu_seqlens=begins)
    return sharding, inputs | {name: sharding.shard(x, 1, _SPLIT[name]) for name, x in split.items()}


def check_loss(config: Any) -> None:
    """Raise ValueError for a mixture of experts that adds its router's loss: one of shards is not that of the whole."""
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True adds a loss that counts how experts share the tokens, of which a process has a "
            "part; set model.config.output_router_logits=False"
        )


def _check_same(inputs: Inputs, group: Any) -> None:
    """Raise ValueError, in every rank, unless all were given the same batch.

    The host waits for one all-gather of a few numbers, a little before it waits to learn where sequences begin.
    """
    group, _, ranks = group_of(group)
    if ranks == 1:
        return
    told = [_told(inputs.get(name)) for name in _COMPARED]
    device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), torch.device("cpu"))
    wrong = [_COMPARED[i] for i in different(torch.stack([x.to(device) for x in told]), group)]
    if wrong:
        raise ValueError(
            f"the {ranks} processes that share a sequence were given different batches ({', '.join(wrong)}); give them "
            "the same: every process reads all data (accelerate's dispatch_batches=False), in one order and with the "
            "same random numbers, which a seed of the dataset's own makes sure of"
        )


def _told(x: Any) -> Tensor:
    """Return what a rank tells of an input, an int64 scalar: a sum over it in which places count, and its shape."""
    if not isinstance(x, Tensor):
        return torch.zeros((), dtype=torch.int64)
    place_N = torch.arange(1, x.numel() + 1, device=x.device)
    return (x.flatten().long() * place_N).sum() + hash(tuple(x.shape))


def _check(inputs: Inputs) -> None:
    if inputs.get("past_key_values") is not None:
        raise ValueError("a cache cannot be split over processes; leave past_key_values out")
    shape = tuple(inputs["input_ids"].shape)
    for name in _SPLIT:
        x = inputs.get(name)
        if x is not None and tuple(x.shape) != shape and (name != "position_ids" or tuple(x.shape) != (1, shape[1])):
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} do not fit input_ids of {shape}; give one for each token"
            )
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.dim() > 0 and name not in (*_SPLIT, *_BOUNDARIES):
            raise ValueError(f"the input {name} cannot be split over processes; leave it out of the batch")


def _boundaries(inputs: Inputs, mask: Tensor | None) -> Tensor | None:
    """Return where sequences begin in the flattened batch, int32; None if every row is one."""
    given = inputs.get("cu_seq_lens_q")
    if given is None:
        return boundaries_of_whole(inputs["input_ids"], mask, inputs.get("position_ids"))
    if mask is not None and not bool(mask.all()):
        raise ValueError("a batch is either padded or packed: drop attention_mask or cu_seq_lens_q")
    boundaries: Tensor = given.int().flatten()
    return boundaries


def attend_sharded(
    kind: Kind,
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    sharding: Sharding,
    scale: float,
    layout: Layout,
) -> Tensor:
    """Return one layer's attention `[B, S, H, D]` under a sharding.

    Args:
        kind: of the layer.
        layout: what the layer is told of its rows; only one that says nothing can be split.

    Raises:
        ValueError: a mask, or keys of a cache.
    """
    if layout.map is not None or layout.cu_q is not None:
        raise ValueError(
            "a mask, and boundaries of packed sequences, cannot be split over processes; cut the batch with "
            "openmoba.hf.shards.shard_inputs, which finds the boundaries in the whole"
        )
    if q_BSHD.shape[1] != k_BSHD.shape[1]:
        raise ValueError("a cache cannot be split over processes; run the model with use_cache=False")

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
        if cu_q is None or cu_k is None:
            return kind.rows(q, k, v, scale)
        return kind.sequences(q, k, v, Sequences(cu_q, cu_k), scale)

    q, k, v = (_as_called(x, sharding) for x in (q_BSHD, k_BSHD, v_BSHD))
    return over_ranks(attend, q, k, v, sharding).view_as(q_BSHD)


def convolve_sharded(keys_BSC: Tensor, weight_CW: Tensor, sharding: Sharding) -> Tensor:
    """Return one layer's convolved keys `[B, S, C]` under a sharding."""
    return key_convolution(_as_called(keys_BSC, sharding), weight_CW, sharding).view_as(keys_BSC)


def _as_called(x: Tensor, sharding: Sharding) -> Tensor:
    """Return a layer's tensor as the operations take it, packed sequences without the batch; ValueError for several."""
    if sharding.cu_seqlens is None:
        return x
    if x.shape[0] != 1:
        raise ValueError(f"packed sequences over processes lie in one row, got {x.shape[0]}; put them in one")
    return x[0]
