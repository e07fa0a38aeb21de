"""Where tokens lie: side by side, or in pages that a block table names (`openmoba.ops.paged`).

A table is `arguments.Table`, or None for tokens side by side. Pages are batch rows of the cache: what is in one page is
read as a stretch of that row. Of a block that lies in several pages (SPLIT, tokens of a page) every key is looked up.

N keys per tile, D head width padded to a power of two (WIDTH is the real one).
"""

from __future__ import annotations

import triton
import triton.language as tl

from openmoba.ops.triton.rows import load_rows


@triton.jit
def page_of(table, sequence, token, valid=None):
    """Return the page of a sequence's token, int64, and the place in it; of tokens not `valid` page 0."""
    at = tl.cast(sequence, tl.int64) * table.sequence + token // table.page_size
    page = tl.load(table.ptr + at) if valid is None else tl.load(table.ptr + at, mask=valid, other=0)
    return page.to(tl.int64), token % table.page_size


@triton.jit
def row_offset(token, stride_t, valid, table, sequence, stride_page):
    """Return how far a sequence's tokens lie behind its first one, or with a table behind the cache's first page."""
    if table is None:
        return token.to(tl.int64) * stride_t
    else:
        page, place = page_of(table, sequence, token, valid)
        return page * stride_page + place.to(tl.int64) * stride_t


@triton.jit
def key_row(sequence, key_begin, call, table, SPLIT: tl.constexpr):
    """Return the batch row of a block's keys and the first one in it.

    `key_begin` numbers it among the keys of all sequences. SPLIT: row 0, and the key's number in the sequence.
    """
    if table is None:
        return sequence, key_begin
    else:
        token = key_begin - tl.load(call.cu_k + sequence)
        if SPLIT > 0:
            return sequence * 0, token
        else:
            return page_of(table, sequence, token)


@triton.jit
def load_keys(
    k,
    v,
    k_base,
    v_base,
    at_N,
    valid,
    table,
    sequence,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Load keys and values `at_N` of a row, or of a sequence (SPLIT, with the bases of page 0), `[N, D]` each."""
    if SPLIT > 0:
        table_ptr = table.ptr + tl.cast(sequence, tl.int64) * table.sequence
        page_N = tl.load(table_ptr + at_N // SPLIT, mask=valid, other=0)
        return load_paged(k, v, k_base, v_base, page_N, at_N % SPLIT, valid, WIDTH, D)
    else:
        k_ND = load_rows(k_base, at_N, k.token, valid, WIDTH, D)
        v_ND = load_rows(v_base, at_N, v.token, valid, WIDTH, D)
        return k_ND, v_ND


@triton.jit
def load_paged(k, v, k_base, v_base, page_N, place_N, valid, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load keys and values in these pages at these places, with the bases of page 0, `[N, D]` each."""
    page_N = page_N.to(tl.int64)
    place_N = place_N.to(tl.int64)
    k_ND = load_rows(k_base, page_N * k.batch + place_N * k.token, 1, valid, WIDTH, D)
    v_ND = load_rows(v_base, page_N * v.batch + place_N * v.token, 1, valid, WIDTH, D)
    return k_ND, v_ND
