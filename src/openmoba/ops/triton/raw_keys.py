"""Key convolution over a block table, in three launches that wait for nothing.

    read      the kept keys before sequences that go on within a page, which the next launch overwrites
    keep      new keys that later tokens need, with their pages; and a copy of all, since the last launch works in place
    convolve  a tile of tokens and channels: earlier new tokens, and the keys before the first ones

Sequences that begin with a page read the keys before them last: another sequence may have written them just now.

M tokens per tile, C channels per tile, R keys before a token.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.arguments import Packed
from openmoba.ops.triton.geometry import cdiv, power_of_two, sequence_of, span
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.table import page_of

_TOKENS, _CHANNELS = 16, 128
"""Of a tile."""


def convolve_paged(
    k_NC: Tensor,
    weight_CW: Tensor,
    raw_keys: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    slots: Tensor,
    page_size: int,
) -> None:
    """Do what `openmoba.ops.raw_keys.convolve_paged` says, of the new tokens that `NewTokens` describes so."""
    (tokens, channels), (sequences, reach) = k_NC.shape, (len(lengths), raw_keys.shape[1])
    if tokens == 0 or sequences == 0:
        return
    before = torch.empty((sequences, reach, channels), dtype=k_NC.dtype, device=k_NC.device)
    raw = torch.empty((tokens, channels), dtype=k_NC.dtype, device=k_NC.device)
    sizes = (tokens, channels, sequences, reach, page_size, block_table.stride(0), k_NC.stride(0))
    read, keep, convolve = _launches(*sizes)
    batch = block_table, starts, lengths
    read(*batch, raw_keys, before)
    keep(*batch, slots, k_NC, raw, raw_keys)
    convolve(*batch, raw, before, raw_keys, weight_CW.to(k_NC.dtype).contiguous(), k_NC)


@lru_cache(maxsize=REMEMBERED)
def _launches(
    tokens: int, channels: int, sequences: int, reach: int, page_size: int, table_stride: int, key_stride: int
) -> tuple[Launch, Launch, Launch]:
    batch = (Packed(TENSOR, table_stride, page_size, TENSOR, sequences), TENSOR)
    width = min(_CHANNELS, power_of_two(channels))
    constants = {"R": reach, "C": width}
    of_tokens = (cdiv(tokens, _TOKENS), cdiv(channels, width))
    tiled = constants | {"M": _TOKENS}
    return (
        Launch(_read_before, (sequences, of_tokens[1]), (*batch, TENSOR, TENSOR, channels), constants),
        Launch(_keep, of_tokens, (*batch, *[TENSOR] * 4, tokens, channels, key_stride), tiled),
        Launch(_convolve, of_tokens, (*batch, *[TENSOR] * 5, tokens, channels, key_stride), tiled),
    )


@triton.jit
def _read_before(batch, length_ptr, raw_keys_ptr, before_ptr, channels, R: tl.constexpr, C: tl.constexpr):
    """Write the R keys before a sequence's new tokens side by side, if these begin within a page."""
    sequence = tl.program_id(0)
    _begin, new = span(sequence, batch.cu_q, 0, True)
    first = tl.load(length_ptr + sequence) - new
    if (new <= 0) | (first % batch.page_size == 0):
        return
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    for number in tl.static_range(R):
        token = first - R + number
        if token >= 0:
            page, _place = page_of(batch, sequence, token)
            x_C = tl.load(raw_keys_ptr + (page * R + token % R) * channels + c_C, mask=c_C < channels)
            at = (sequence.to(tl.int64) * R + number) * channels
            tl.store(before_ptr + at + c_C, x_C, mask=c_C < channels)


@triton.jit
def _keep(
    batch,
    length_ptr,
    slot_ptr,
    k_ptr,
    raw_ptr,
    raw_keys_ptr,
    tokens,
    channels,
    key_stride,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """Write a tile of new keys once more, and keep those of the last tokens of pages and of sequences."""
    n_M, exists_M, _sequence_M, number_M, left_M, first_M = _tile(batch, length_ptr, tokens, M)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    exists_MC = exists_M[:, None] & (c_C < channels)[None, :]
    x_MC = tl.load(k_ptr + n_M[:, None] * key_stride + c_C, mask=exists_MC, other=0.0)
    tl.store(raw_ptr + n_M[:, None] * channels + c_C, x_MC, mask=exists_MC)
    slot_M = tl.load(slot_ptr + n_M, mask=exists_M, other=-1)
    last_M = (slot_M % batch.page_size >= batch.page_size - R) | (left_M <= R)
    row_M = slot_M // batch.page_size * R + (first_M + number_M) % R
    tl.store(raw_keys_ptr + row_M[:, None] * channels + c_C, x_MC, mask=((slot_M >= 0) & last_M)[:, None] & exists_MC)


@triton.jit
def _convolve(
    batch,
    length_ptr,
    raw_ptr,
    before_ptr,
    raw_keys_ptr,
    weight_ptr,
    k_ptr,
    tokens,
    channels,
    key_stride,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """Write the convolved keys of a tile of tokens."""
    n_M, exists_M, sequence_M, number_M, _left_M, first_M = _tile(batch, length_ptr, tokens, M)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    exists_MC = exists_M[:, None] & (c_C < channels)[None, :]
    begins_page_M = first_M % batch.page_size == 0
    x_MC = _wide(tl.load(raw_ptr + n_M[:, None] * channels + c_C, mask=exists_MC, other=0.0))
    sum_MC = x_MC * _wide(tl.load(weight_ptr + c_C * (R + 1), mask=c_C < channels, other=0.0))
    for d in tl.static_range(1, R + 1):
        # One of three loads has the key d tokens before; the others load nothing, which adds 0.
        token_M = first_M + number_M - d
        is_new_M = number_M >= d
        past_MC = tl.load(raw_ptr + (n_M - d)[:, None] * channels + c_C, mask=is_new_M[:, None] & exists_MC, other=0.0)
        is_old_M = exists_M & (number_M < d) & (token_M >= 0)
        # Another sequence may have written the page before in this step, so it is read after `_keep`.
        page_M, _place_M = page_of(batch, sequence_M, token_M, is_old_M & begins_page_M)
        row_M = page_M * R + token_M % R
        of_page_MC = (is_old_M & begins_page_M)[:, None] & exists_MC
        past_MC += tl.load(raw_keys_ptr + row_M[:, None] * channels + c_C, mask=of_page_MC, other=0.0)
        # Within a page the sequence's own new tokens may have overwritten them; `_read_before` was before that.
        row_M = sequence_M.to(tl.int64) * R + R + number_M - d
        read_MC = (is_old_M & (begins_page_M == 0))[:, None] & exists_MC
        past_MC += tl.load(before_ptr + row_M[:, None] * channels + c_C, mask=read_MC, other=0.0)
        sum_MC += _wide(past_MC) * _wide(tl.load(weight_ptr + c_C * (R + 1) + d, mask=c_C < channels, other=0.0))
    out_MC = x_MC + sum_MC * tl.sigmoid(sum_MC)
    out_MC = out_MC.to(k_ptr.dtype.element_ty)
    tl.store(k_ptr + n_M[:, None] * key_stride + c_C, out_MC, mask=exists_MC)


@triton.jit
def _tile(batch, length_ptr, tokens, M: tl.constexpr):
    """Return a tile's new tokens, and whether they exist; of each its sequence, and then of that sequence's new tokens
    its number, how many are left from it on, and the position of the first.
    """
    n_M = tl.program_id(0) * M + tl.arange(0, M)
    sequence_M = sequence_of(n_M, batch, True)
    begin_M = tl.load(batch.cu_q + sequence_M)
    new_M = tl.load(batch.cu_q + sequence_M + 1) - begin_M
    number_M = n_M - begin_M
    left_M = new_M - number_M
    exists_M = (n_M < tokens) & (left_M > 0)
    return n_M.to(tl.int64), exists_M, sequence_M, number_M, left_M, tl.load(length_ptr + sequence_M) - new_M


@triton.jit
def _wide(x):
    """Return a number in the precision that sums are in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)
