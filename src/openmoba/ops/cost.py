"""What one query head reads: query-key pairs and centroid scores of one whole sequence, dense and MoBA.

Symbols: T tokens, B block size, k top-k. Block i holds n_i tokens (B, or fewer in the last). Its queries read
their own block causally, n_i * (n_i + 1) / 2 pairs, and min(i, k - 1) past blocks of B keys each. To choose,
they score i centroids; where i <= k - 1 all past blocks are read and nothing has to be scored.

Source: MoBA technical report, arXiv 2502.13189, section 2.2. The pairs equal the count of ones in the mask of
`openmoba.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator

from openmoba.config import check_blocks


def causal_pairs(tokens: int) -> int:
    """Count the query-key pairs per head of full causal attention: T * (T + 1) / 2."""
    return tokens * (tokens + 1) // 2


def moba_pairs(tokens: int, block_size: int, top_k: int) -> int:
    """Count the query-key pairs per head of MoBA: the ones in its mask.

    With T=6, B=2, k=2:
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .      own block causally, and one past block of two keys: 1+2 + 3+4 + 3+4 = 17
        1 1 1 1 . .
        1 1 . . 1 .
        . . 1 1 1 1
    """
    return sum(
        count * min(block, top_k - 1) * block_size + causal_pairs(count)
        for block, count in _block_sizes(tokens, block_size, top_k)
    )


def moba_scores(tokens: int, block_size: int, top_k: int) -> int:
    """Count the query-centroid scores per head of MoBA, of the queries that have a choice to make."""
    if top_k == 1:
        return 0
    return sum(count * block for block, count in _block_sizes(tokens, block_size, top_k) if block > top_k - 1)


def _block_sizes(tokens: int, block_size: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Return number and token count of each block of the sequence."""
    check_blocks(block_size, top_k)
    if tokens < 0:
        raise ValueError(f"tokens must be >= 0, got {tokens}")
    return ((start // block_size, min(block_size, tokens - start)) for start in range(0, tokens, block_size))
