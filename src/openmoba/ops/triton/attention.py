"""The Triton backend (`openmoba.ops.backends.Backend`): route, plan, attend, some key/value heads at a time.

The partial results of all pairs would not fit in memory at long context (64 GB at 1M tokens), so key/value heads are
worked on in chunks under a cap: OPENMOBA_WORKSPACE_MB, or by default a part of the device's memory and not more than
what longer launches gain by. Where one head is too large, the forward works on ranges of its query tokens. The cap
depends on the device alone, and neither heads nor query tokens interact, so it never changes a bit of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from openmoba.ops.arguments import Blocking
from openmoba.ops.triton.attend import attend_heads
from openmoba.ops.triton.geometry import Geometry, cdiv
from openmoba.ops.triton.given import given_sort_keys
from openmoba.ops.triton.gradients import dq_pieces, heads_gradients, key_partial_bytes
from openmoba.ops.triton.host.device import memory_bytes
from openmoba.ops.triton.host.launch import REMEMBERED
from openmoba.ops.triton.host.replay import replayed
from openmoba.ops.triton.plan import Plan, make_plan, split_plan
from openmoba.ops.triton.route import INT16_SORT_KEYS, route, select
from openmoba.ops.triton.statistics import row_statistics

__all__ = ["backward", "choice_shape", "forward", "select"]

F = TypeVar("F", bound=Callable[..., tuple[Tensor, ...]])

_MOST_PAIRS = 2**30  # numbered in int32, and searched by halving sums of two places
_FORWARD_PART, _BACKWARD_PART = 64, 48  # of the device's memory, by which it is divided
_SHORT = 2**28  # elements of queries and partial results; temporaries are held at once when replayed
# Bytes of partial results. More of them make fewer launches with shorter tails; the forward has fewer per pair.
_FORWARD_WORKSPACE, _BACKWARD_WORKSPACE = 3 * 2**28, 25 * 2**26


def _replaying_short_calls(function: F) -> F:
    """Replay calls for which Python may take longer than the GPU. Tensors and settings are passed by position."""

    def flat(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, cu_q, cu_k, block_size, top_k, scale = arguments
        return function(*tensors, Blocking(cu_q, cu_k, block_size, top_k), scale)

    @wraps(function)
    def call(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, (cu_q, cu_k, block_size, top_k), scale = arguments
        if tensors[0].is_cuda and tensors[0].numel() * top_k <= _SHORT:
            settings, caps = (block_size, top_k, scale), workspaces(tensors[0].device)
            return replayed(flat, (*tensors, cu_q, cu_k), settings, caps)
        return function(*arguments)

    return cast(F, call)


@_replaying_short_calls
def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, blocking: Blocking, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp, and the plan (`choice_shape`) that the backward reads."""
    cu_q, cu_k, block_size, top_k = blocking
    geometry = Geometry.shared(q, k, cu_q, block_size, _most_read(k, block_size, top_k))
    check_pairs(geometry)
    q = near(q, geometry.group)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    blocks = blocks if top_k > 1 else None  # lists of no blocks
    choice = torch.empty(choice_numbers(geometry, blocks is not None), dtype=torch.int32, device=q.device)
    heads = heads_at_once(geometry, q.dtype, q.device)
    sort_keys, counts = None, _counts(choice, geometry)
    if blocks is not None and counts is not None:
        sort_keys = given_sort_keys(blocks, cu_q, cu_k, geometry, heads, counts)
    elif geometry.top_k > 1:
        sort_keys = route(q, k, cu_q, cu_k, geometry, heads)
    attend(q, k, v, cu_q, cu_k, geometry, scale, heads, sort_keys, choice, out, lse)
    return out, lse, choice


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    geometry: Geometry,
    scale: float,
    heads: int,
    sort_keys: Tensor | None,
    choice: Tensor,
    out: Tensor,
    lse: Tensor,
    *table: Tensor,
) -> None:
    """Write output and log-sum-exp of what sort keys name (None: own blocks alone), and the plan into `choice`.

    `heads`: of keys and values, are worked on at once, as the sort keys are counted.
    """
    tokens = tokens_at_once(geometry, heads, q.dtype, q.device)
    for first, together, plan in _plans(choice, geometry, heads):
        if sort_keys is not None and plan is not None:
            make_plan(sort_keys[first : first + together], plan.pairs, plan.offsets, geometry)
        for its_tokens, its_plan in split_plan(plan, geometry, tokens):
            attend_heads(q, k, v, cu_q, cu_k, geometry, scale, first, together, its_tokens, its_plan, out, lse, *table)


@_replaying_short_calls
def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    choice: Tensor,
    blocking: Blocking,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, contiguous."""
    cu_q, cu_k, block_size, top_k = blocking
    geometry = Geometry.shared(q, k, cu_q, block_size, _most_read(k, block_size, top_k))
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    q, d_out = near(q, geometry.group), near(d_out, geometry.group)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_lse = d_lse if d_lse is None or d_lse.is_contiguous() else d_lse.contiguous()
    statistics = row_statistics(d_out, d_lse, out, lse, geometry)
    heads = heads_at_once(geometry, q.dtype, q.device)
    for first, together, plan in _plans(choice, geometry, heads):
        heads_gradients(d_out, q, k, v, statistics, cu_q, cu_k, geometry, scale, first, together, plan, dq, dk, dv)
    return dq, dk, dv


def near(x: Tensor, group: int) -> Tensor:
    """Return `x`, copied if the heads of a group are further apart than int32, in which the kernels count, can say."""
    return x.contiguous() if (group - 1) * x.stride(-2) >= 2**31 else x


def choice_shape(q: Tensor, k: Tensor, blocks: Tensor | None, blocking: Blocking) -> tuple[int]:
    """Return how long the plan of all heads is: `pairs`, `offsets`, then `counts` of given blocks (`plan.Plan`)."""
    cu_q, _, block_size, top_k = blocking
    geometry = Geometry.of(q, k, cu_q, block_size, _most_read(k, block_size, top_k))
    return (choice_numbers(geometry, blocks is not None and top_k > 1),)


def _most_read(k: Tensor, block_size: int, top_k: int) -> int:
    """Return the most different blocks that a query can read: of more, `blocks` repeats some or says none."""
    most: int = torch.sym_min(top_k, cdiv(k.shape[-3], block_size))
    return most


def choice_numbers(geometry: Geometry, given: bool) -> int:
    """Return how long the plan of all heads is (`choice_shape`)."""
    lists = geometry.pairs + geometry.block_slots + 1 if geometry.top_k > 1 else 0
    return geometry.kv_heads * (lists + (geometry.rows if given else 0))


def _counts(choice: Tensor, geometry: Geometry) -> Tensor | None:
    """Return how many of its given blocks every row reads; None where MoBA chose."""
    lists = choice_numbers(geometry, given=False)
    return choice.narrow(0, lists, choice.shape[0] - lists) if choice.shape[0] > lists else None


def heads_at_once(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many key/value heads' partial results fit in the workspace, forward and backward; at least one."""
    return _fitting_heads(geometry, dtype, *workspaces(device))


@lru_cache(maxsize=REMEMBERED)
def _fitting_heads(geometry: Geometry, dtype: torch.dtype, forward_bytes: int, backward_bytes: int) -> int:
    shares = max(1, dq_pieces(geometry, dtype))
    backward_head = _head_bytes(geometry, dtype, shares) + key_partial_bytes(geometry)
    forward_heads = forward_bytes // max(1, _head_bytes(geometry, dtype, shares=1))
    backward_heads = backward_bytes // max(1, backward_head)
    sortable = (INT16_SORT_KEYS - 1) // geometry.block_slots
    chunks = cdiv(geometry.kv_heads, max(1, min(forward_heads, backward_heads, sortable)))
    return cdiv(geometry.kv_heads, chunks)


def tokens_at_once(geometry: Geometry, heads: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many query tokens' forward partial results fit in the workspace, at least one."""
    ranges = cdiv(heads * _head_bytes(geometry, dtype, shares=1), workspaces(device)[0])
    return cdiv(geometry.query_tokens, max(1, ranges))


def workspaces(device: torch.device) -> tuple[int, int]:
    """Return the caps on partial results, forward and backward: OPENMOBA_WORKSPACE_MB, or by the device's memory."""
    asked = os.environ.get("OPENMOBA_WORKSPACE_MB")
    if asked is not None:
        if not asked.isdigit() or int(asked) == 0:
            raise ValueError(f"OPENMOBA_WORKSPACE_MB must be a whole number of megabytes >= 1, got {asked!r}")
        return (int(asked) * 2**20,) * 2
    if device.type != "cuda":
        return _FORWARD_WORKSPACE, _BACKWARD_WORKSPACE  # Triton's interpreter
    memory = memory_bytes(device)
    return min(memory // _FORWARD_PART, _FORWARD_WORKSPACE), min(memory // _BACKWARD_PART, _BACKWARD_WORKSPACE)


def check_pairs(geometry: Geometry) -> None:
    """Raise ValueError if there are more pairs of query and block than kernels can number."""
    if geometry.pairs >= _MOST_PAIRS:
        raise ValueError(
            f"{geometry.query_tokens} query tokens, {geometry.group} query heads per key/value head and "
            f"top_k={geometry.top_k} make {geometry.pairs} pairs of query and block, 2^30 or more; "
            "attend to fewer query tokens per call"
        )


def _head_bytes(geometry: Geometry, dtype: torch.dtype, shares: int) -> int:
    """Return the bytes of a head's partial results, their log-sum-exp, and what is sorted."""
    return geometry.pairs * (geometry.width * dtype.itemsize * shares + 24)


def _plans(choice: Tensor, geometry: Geometry, heads: int) -> Iterator[tuple[int, int, Plan | None]]:
    """Yield the chunks of key/value heads: the first, how many, and their plan in `choice` (none if top_k is 1)."""
    pairs, lists, rows = geometry.pairs, geometry.block_slots + 1, geometry.rows
    first_offset = geometry.kv_heads * pairs
    counts = _counts(choice, geometry)
    for first in range(0, geometry.kv_heads, heads):
        together = min(heads, geometry.kv_heads - first)
        if not pairs:
            yield first, together, None
            continue
        its_pairs = choice.narrow(0, first * pairs, together * pairs)
        offsets = choice.narrow(0, first_offset + first * lists, together * lists)
        its_counts = None if counts is None else counts.narrow(0, first * rows, together * rows)
        yield first, together, Plan(its_pairs, offsets, together, together * pairs, counts=its_counts)
