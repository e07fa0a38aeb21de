"""MoBA on CPU in torch operations: only chosen blocks are read, memory is linear in tokens.

Forward: every tile (see `openmoba.ops.tiles`) is one attention with output o_i and log-sum-exp l_i; with
`l = log sum_i exp(l_i)`, the output is `sum_i exp(l_i - l) o_i`, a weighted bag of the tiles' partials.
Backward: under the softmax over all tiles, a tile's gradients need only the whole output and l, so tiles stay
independent: dQ is a bag of partials, dK and dV are added up where the keys lie. All sums have a fixed order, so
results repeat bit for bit.

Suffixes: T query tokens, S key tokens, H query heads, J key/value heads, G query heads per key/value head,
D head width, L tiles, R rows of a tile, M keys of a tile, C partials of a query row. Q counts query rows and K key
rows of a part; in `selected_TJGK`, K = top_k - 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from openmoba.ops.arguments import Blocking
from openmoba.ops.checks import check_boundary_values
from openmoba.ops.selection import select
from openmoba.ops.tiles import Part, Tiles, Tiling, parts, sequences_of, tiled

__all__ = ["backward", "choice_shape", "forward", "select"]

# What scaled_dot_product_attention runs on CPU. Called directly, it returns the log-sum-exp, and its backward takes
# that of a larger softmax, which the tile is a part of.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Bytes gathered for one call of the tile kernel; more fall out of the cache.
BYTES_AT_ONCE = 2**22
_ROW_TERM_COLUMNS = 16  # two would do, but a width with few factors of two is slow


class _Workspace:
    """One buffer for the partials of part after part: touching fresh memory costs as much as filling it."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.float32, device="cpu")

    def rows(self, count: int, width: int) -> Tensor:
        """Return uninitialised fp32 `[count, width]`, valid until the next call."""
        if self.buffer.numel() < count * width:
            self.buffer = torch.empty(count * width, dtype=torch.float32, device="cpu")
        return self.buffer[: count * width].view(count, width)


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, blocking: Blocking, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and selection, as `openmoba.ops.backends.Backend` defines them."""
    selected = select(q, k, blocking) if blocks is None else _once(blocks, q.shape[-2])
    cu_q, cu_k, block_size, _ = blocking
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    q_TJGD, out_TJGD, lse_TJG, selected_TJGK = (
        _by_head(_packed(x, cu_q), k.shape[-2]) for x in (q, out, lse, selected)
    )
    k_SJD, v_SJD = _packed(k, cu_k), _packed(v, cu_k)
    workspace = _Workspace()
    for part in _parts(q, k, blocking):
        tiling = tiled(part, _rows(selected_TJGK, part), block_size)
        q_QD = _with_padding([_rows(q_TJGD, part)])
        kv_KD = _keys([k_SJD, v_SJD], part)
        out_QD, lse_Q = _forward_part(tiling, q_QD, kv_KD, scale, workspace)
        _put_rows(out_TJGD, part, out_QD)
        _put_rows(lse_TJG, part, lse_Q)
    return out, lse, selected


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    blocking: Blocking,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; those of k and v are summed in fp32."""
    if d_lse is not None:
        wider = _with_row_term(d_out, d_lse, q, k, v, out)
        gradients = backward(wider[0], None, *wider[1:], lse, selected, blocking, scale)
        dq, dk, dv = (x[..., : q.shape[-1]].contiguous() for x in gradients)
        return dq, dk, dv
    cu_q, cu_k, block_size, _ = blocking
    dq = q.new_empty(q.shape)
    dk, dv = (k.new_zeros(k.shape, dtype=torch.float32) for _ in range(2))
    q_TJGD, d_out_TJGD, out_TJGD, lse_TJG, selected_TJGK, dq_TJGD = (
        _by_head(_packed(x, cu_q), k.shape[-2]) for x in (q, d_out, out, lse, selected, dq)
    )
    k_SJD, v_SJD, dk_SJD, dv_SJD = (_packed(x, cu_k) for x in (k, v, dk, dv))
    workspace = _Workspace()
    for part in _parts(q, k, blocking):
        tiling = tiled(part, _rows(selected_TJGK, part), block_size)
        rows_QD = _with_padding([_rows(x, part) for x in (q_TJGD, d_out_TJGD, out_TJGD)])
        lse_Q = _with_padding([_rows(lse_TJG, part)[..., None]])[:, 0]
        kv_KD = _keys([k_SJD, v_SJD], part)
        dq_QD, dk_KD, dv_KD = _backward_part(tiling, rows_QD, lse_Q, kv_KD, scale, workspace)
        _put_rows(dq_TJGD, part, dq_QD)
        for whole_SJD, part_KD in ((dk_SJD, dk_KD), (dv_SJD, dv_KD)):
            part_JSD = whole_SJD[part.keys, part.heads].transpose(0, 1)
            part_JSD += part_KD.view(part_JSD.shape)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def choice_shape(q: Tensor, k: Tensor, blocks: Tensor | None, blocking: Blocking) -> tuple[int, ...]:
    """Return the shape of `selected`, the choice that the forward hands to the backward."""
    return (*q.shape[:-1], blocking.top_k - 1)


def _once(blocks: Tensor, heads: int) -> Tensor:
    """Return given blocks per query head, `[..., H, m]`, in the order they were given in, -1 for repeats."""
    blocks = blocks.repeat_interleave(heads // blocks.shape[-2], dim=-2)
    ordered, place = blocks.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(blocks, dtype=torch.bool)
    repeats[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return blocks.masked_fill(torch.empty_like(repeats).scatter_(-1, place, repeats), -1)


def _with_row_term(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Add columns, so that the backward's row term, `sum(d_out * out)`, is less by `d_lse`.

    That is all a gradient of the log-sum-exp changes: dS = P * (dP - sum(d_out * out) + d_lse). Values are zero in the
    new columns, where the gradient of the output is one and the output is `-d_lse`, in two numbers of its precision.
    """
    high = d_lse.to(out.dtype)
    low = (d_lse - high.float()).to(out.dtype)
    columns = (0, _ROW_TERM_COLUMNS)
    q, k, v, d_out, out = (torch.nn.functional.pad(x, columns) for x in (q, k, v, d_out, out))
    d_out[..., -2:] = 1
    out[..., -2], out[..., -1] = -high, -low
    return d_out, q, k, v, out


def _forward_part(
    tiling: Tiling, q_QD: Tensor, kv_KD: Tensor, scale: float, workspace: _Workspace
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, fp32, of a part's query rows."""
    width = q_QD.shape[1]
    partial_D = workspace.rows(tiling.partials + 1, width)
    partial_lse = q_QD.new_empty(tiling.partials + 1, dtype=torch.float32)
    partial_D[-1], partial_lse[-1] = 0, -torch.inf
    start = 0
    for tiles, row_LR, key_LM in _batches(tiling, width * q_QD.itemsize):
        q_L1RD = _gather(q_QD, row_LR)
        k_L1MD, v_L1MD = _gather(kv_KD, key_LM).chunk(2, dim=-1)
        o_L1RD, lse_L1R = _attend(q_L1RD, k_L1MD, v_L1MD, 0.0, tiles.causal, scale=scale)
        if not lse_L1R.all():
            lse_L1R = _where_zero(lse_L1R, q_L1RD, k_L1MD, tiles.causal, scale)
        end = start + row_LR.numel()
        partial_D[start:end] = o_L1RD.reshape(-1, width)
        partial_lse[start:end] = lse_L1R.flatten()
        start = end
    lse_QC = partial_lse[tiling.partials_of_row]
    lse_Q = lse_QC.logsumexp(1)
    weight_QC = (lse_QC - lse_Q[:, None]).exp_()
    return embedding_bag(tiling.partials_of_row, partial_D, mode="sum", per_sample_weights=weight_QC), lse_Q


def _where_zero(lse_L1R: Tensor, q_L1RD: Tensor, k_L1MD: Tensor, causal: bool, scale: float) -> Tensor:
    """Return the log-sum-exps of tiles, those that are 0 anew: torch's kernel says 0 of a row that it takes for one
    without keys, whose logits are all `-inf` or, of a few keys, NaN.
    """
    logit_L1RM = scale * (q_L1RD.float() @ k_L1MD.float().transpose(-1, -2))
    if causal:
        after_RM = torch.ones(logit_L1RM.shape[-2:], dtype=torch.bool, device="cpu").triu(1)
        logit_L1RM = logit_L1RM.masked_fill(after_RM, -torch.inf)
    return torch.where(lse_L1R == 0, logit_L1RM.logsumexp(-1), lse_L1R)


def _backward_part(
    tiling: Tiling, rows_QD: Tensor, lse_Q: Tensor, kv_KD: Tensor, scale: float, workspace: _Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fp32 gradients of a part's query rows, keys and values; `rows_QD` is q, d_out and out side by side."""
    width = rows_QD.shape[1] // 3
    partial_D = workspace.rows(tiling.partials + 1, width)
    partial_D[-1] = 0
    dk_KD, dv_KD = (kv_KD.new_zeros((len(kv_KD), width), dtype=torch.float32) for _ in range(2))
    start = 0
    for tiles, row_LR, key_LM in _batches(tiling, width * rows_QD.itemsize):
        q_L1RD, d_out_L1RD, out_L1RD = _gather(rows_QD, row_LR).chunk(3, dim=-1)
        k_L1MD, v_L1MD = _gather(kv_KD, key_LM).chunk(2, dim=-1)
        lse_L1R = lse_Q[row_LR][:, None]
        dq, dk, dv = _attend_backward(
            d_out_L1RD, q_L1RD, k_L1MD, v_L1MD, out_L1RD, lse_L1R, 0.0, tiles.causal, scale=scale
        )
        end = start + row_LR.numel()
        partial_D[start:end] = dq.reshape(-1, width)
        dk_KD.index_add_(0, key_LM.flatten(), dk.reshape(-1, width).float())
        dv_KD.index_add_(0, key_LM.flatten(), dv.reshape(-1, width).float())
        start = end
    return embedding_bag(tiling.partials_of_row, partial_D, mode="sum"), dk_KD, dv_KD


def _batches(tiling: Tiling, row_bytes: int) -> Iterator[tuple[Tiles, Tensor, Tensor]]:
    """Yield tiles a few at a time, in the order of their partials, with the query and key rows they gather."""
    threads = torch.get_num_threads()
    for tiles in tiling.tiles:
        tile_bytes = (3 * tiles.row_LR.shape[1] + 2 * tiles.span) * row_bytes
        at_once = max(1, BYTES_AT_ONCE // tile_bytes // threads) * threads
        key_M = torch.arange(tiles.span, device="cpu")
        for row_LR, key_L in zip(torch.split(tiles.row_LR, at_once), torch.split(tiles.key_L, at_once), strict=True):
            yield tiles, row_LR, key_L[:, None] + key_M


def _gather(x_QD: Tensor, row_LR: Tensor) -> Tensor:
    """Gather `x_QD[row_LR]` as one head per tile, `[L, 1, R, D]`."""
    return x_QD.index_select(0, row_LR.flatten()).view(len(row_LR), 1, row_LR.shape[1], -1)


def _parts(q: Tensor, k: Tensor, blocking: Blocking) -> Iterator[Part]:
    cu_q, cu_k, block_size, top_k = blocking
    if cu_q is None or cu_k is None:
        bounds = ([i * x.shape[1] for i in range(len(x) + 1)] for x in (q, k))
    else:
        check_boundary_values(cu_q, cu_k, len(q), len(k))
        bounds = (cu.tolist() for cu in (cu_q, cu_k))
    kv_heads = k.shape[-2]
    partials_per_query = q.shape[-2] // kv_heads * top_k
    return parts(sequences_of(*bounds), kv_heads, partials_per_query, block_size)


def _packed(x: Tensor, cu: Tensor | None) -> Tensor:
    """View a batch as a packed tensor, where the strides allow."""
    return x.flatten(0, 1) if cu is None else x


def _by_head(x_THD: Tensor, kv_heads: int) -> Tensor:
    """Group query heads by their key/value head, `[T, J, G, ...]`."""
    return torch.unflatten(x_THD, 1, (kv_heads, -1))


def _rows(x_TJGD: Tensor, part: Part) -> Tensor:
    """Return what is in a part, in the order of its query rows, `[J, T, G, ...]`, a view."""
    return x_TJGD[part.queries, part.heads].transpose(0, 1)


def _put_rows(x_TJGD: Tensor, part: Part, rows_QD: Tensor) -> None:
    """Write a part's query rows where `_rows` reads them."""
    part_JTGD = _rows(x_TJGD, part)
    part_JTGD.copy_(rows_QD.view(part_JTGD.shape))


def _with_padding(xs_JTGD: list[Tensor]) -> Tensor:
    """Lay query rows side by side in one contiguous tensor, and a last row of zeros, which padding reads."""
    rows, width = xs_JTGD[0].shape[:3].numel(), xs_JTGD[0].shape[3]
    joint = xs_JTGD[0].new_zeros((rows + 1, len(xs_JTGD) * width))
    for x_JTGD, column in zip(xs_JTGD, joint[:-1].chunk(len(xs_JTGD), dim=1), strict=True):
        torch.unflatten(column, 0, x_JTGD.shape[:3]).copy_(x_JTGD)
    return joint


def _keys(xs_SJD: list[Tensor], part: Part) -> Tensor:
    """Lay keys and values of a part side by side, in the order of its key rows."""
    return torch.cat([x[part.keys, part.heads].transpose(0, 1) for x in xs_SJD], dim=-1).flatten(0, 1)
