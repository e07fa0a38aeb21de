"""FlexAttention over MoBA's choice: the mask of `moba_select` as tiles of 128 x 128 and a function of positions."""

# B batch, T tokens, H heads, K key/value heads, D head width, R past blocks per query, Q query tiles, N key tiles

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from openmoba.bench.cases import Case
from openmoba.bench.inputs import Inputs

TILE = 128


def flex_call(case: Case, inputs: Inputs, selected_BTHR: Tensor) -> Callable[[], Tensor]:
    """Make a compiled call `-> [B, T, H, D]`; choosing blocks and building the mask are not part of it."""
    mask = choice_mask(case, selected_BTHR)
    grouped = case.heads != case.kv_heads

    # Inputs of the graph are leaves: the compiler looks at their `.grad`, and torch warns of that of a view.
    def attend(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: BlockMask) -> Tensor:
        q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        out_BHTD: Tensor = flex_attention(q_BHTD, k_BKTD, v_BKTD, block_mask=mask, enable_gqa=grouped)
        return out_BHTD.transpose(1, 2)

    torch.compiler.reset()  # every mask is another graph: recompilation would stop at a limit
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)

    def call() -> Tensor:
        out_BTHD: Tensor = compiled(inputs.q, inputs.k, inputs.v, mask)
        return out_BTHD

    return call


def choice_mask(case: Case, selected_BTHR: Tensor) -> BlockMask:
    """Build the mask of MoBA's choice.

    Raises:
        ValueError: tokens or block size do not divide into tiles of 128.
    """
    for name, value in (("tokens", case.tokens), ("block_size", case.block_size)):
        if value % TILE:
            raise ValueError(f"FlexAttention works on tiles of {TILE}, {name}={value} is not a multiple")
    block_size = case.block_size

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = key // block_size
        chosen = block == query // block_size
        for rank in range(case.top_k - 1):
            chosen = chosen | (selected_BTHR[batch, query, head, rank] == block)
        return chosen & (key <= query)

    tiles_BHQN = _touched_tiles(selected_BTHR, case.tokens, block_size)
    counts_BHQ = tiles_BHQN.sum(-1, dtype=torch.int32)
    order_BHQN = tiles_BHQN.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    lengths = (case.tokens, case.tokens)
    return BlockMask.from_kv_blocks(counts_BHQ, order_BHQN, BLOCK_SIZE=TILE, mask_mod=reads, seq_lengths=lengths)


def _touched_tiles(selected_BTHR: Tensor, tokens: int, block_size: int) -> Tensor:
    """Tell which tiles of queries by keys hold a pair that is read."""
    batch, _, heads, _ = selected_BTHR.shape
    device = selected_BTHR.device
    blocks, tiles = -(-tokens // block_size), tokens // TILE
    picks_BHQR = selected_BTHR.view(batch, tiles, TILE, heads, -1).permute(0, 3, 1, 2, 4).flatten(3).long()
    touched = torch.zeros(batch, heads, tiles, blocks + 1, dtype=torch.bool, device=device)
    touched.scatter_(-1, torch.where(picks_BHQR < 0, blocks, picks_BHQR), True)
    tile_N = torch.arange(tiles, device=device)
    touched.scatter_(-1, (tile_N * TILE // block_size).expand(batch, heads, tiles)[..., None], True)
    touched_BHQN = touched[..., tile_N * TILE // block_size]
    return touched_BHQN & (tile_N <= tile_N[:, None])
