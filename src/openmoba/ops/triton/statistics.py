"""Statistics of query rows for the backward: base-2 log-sum-exp and delta = <d_out, out> - d_lse."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmoba.ops.triton.arguments import Results, Rows
from openmoba.ops.triton.geometry import Geometry, cdiv, power_of_two, strides
from openmoba.ops.triton.host.launch import REMEMBERED, TENSOR, Launch
from openmoba.ops.triton.rows import LOG2E, STATISTICS, load_rows


def row_statistics(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, geometry: Geometry) -> Tensor:
    """Return fp32 `[rows, H, 4]`: base-2 log-sum-exp, delta = <d_out, out> less lse's gradient, two unused."""
    statistics = torch.empty((*lse.shape, STATISTICS.value), dtype=torch.float32, device=out.device)
    _launch(geometry, strides(d_out))(d_out, d_lse, out, lse, statistics)
    return statistics


@lru_cache(maxsize=REMEMBERED)
def _launch(geometry: Geometry, d_out_strides: tuple[int, int, int]) -> Launch:
    rows, m = geometry.query_tokens * geometry.heads, 64
    constants = {"HEADS": geometry.heads, "WIDTH": geometry.width, "M": m, "D": power_of_two(geometry.width)}
    arguments = (Rows.of(d_out_strides), TENSOR, Results(TENSOR, TENSOR), TENSOR, geometry.tokens_q, rows)
    return Launch(_row_statistics, (cdiv(rows, m),), arguments, constants)


@triton.jit
def _row_statistics(
    d_out, d_lse_ptr, results, statistics_ptr, tokens_q, rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    valid = row < rows
    token = (row // HEADS).to(tl.int64)
    at = token // tokens_q * d_out.batch + token % tokens_q * d_out.token + (row % HEADS).to(tl.int64) * d_out.head
    d_out_MD = load_rows(d_out.ptr, at, 1, valid, WIDTH, D).to(tl.float32)
    out_MD = load_rows(results.out, row, WIDTH, valid, WIDTH, D).to(tl.float32)
    delta_M = tl.sum(d_out_MD * out_MD, 1)
    if d_lse_ptr is not None:
        # The log-sum-exp grows with a logit by P, so its gradient adds P * d_lse to dS = P * (dO v - delta).
        delta_M -= tl.load(d_lse_ptr + row, mask=valid, other=0.0)
    lse_M = tl.load(results.lse + row, mask=valid, other=0.0) * LOG2E
    c = tl.arange(0, STATISTICS)
    both_MC = tl.where((c == 0)[None, :], lse_M[:, None], tl.where((c == 1)[None, :], delta_M[:, None], 0.0))
    tl.store(statistics_ptr + row[:, None].to(tl.int64) * STATISTICS + c[None, :], both_MC, mask=valid[:, None])
