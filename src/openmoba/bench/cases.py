"""What is timed: one call's shape, settings, routing and passes, and the named grids of such cases."""

from __future__ import annotations

from dataclasses import dataclass, replace

from openmoba.ops.cost import causal_pairs, moba_pairs, moba_scores

ROUTINGS = ("random", "skewed")
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One call: `batch` sequences of `tokens`, MoBA with `block_size` and `top_k`.

    Attributes:
        routing: "random" (standard normal inputs), or "skewed" (half of all queries choose the first block).
        passes: "forward" (no gradients wanted) or "forward+backward".
    """

    tokens: int
    block_size: int
    top_k: int
    head_dim: int = 128
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    routing: str = "random"
    dtype: str = "bfloat16"
    passes: str = "forward+backward"

    def __post_init__(self) -> None:
        for name, value, known in (("routing", self.routing, ROUTINGS), ("passes", self.passes, PASSES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.passes == "forward+backward"

    def operations(self, *, dense: bool, scores: bool) -> int:
        """Count the operations that attention in memory linear in tokens has to do, two per multiply-add.

        4 D per query-key pair forward and 10 D backward, which forms the logits anew; 2 D per centroid score.

        Args:
            dense: causal attention over all pairs, else over MoBA's.
            scores: whether the blocks are chosen inside the call.
        """
        pairs = causal_pairs(self.tokens) if dense else moba_pairs(self.tokens, self.block_size, self.top_k)
        per_head = (14 if self.backward else 4) * pairs
        if scores:
            per_head += 2 * moba_scores(self.tokens, self.block_size, self.top_k)
        return per_head * self.head_dim * self.heads * self.batch


_K = 1024
_TABLE = (
    *(Case(tokens * _K, 128, 8) for tokens in (8, 32, 128, 256)),
    *(Case(tokens * _K, 512, 3) for tokens in (8, 32, 128)),
    *(Case(tokens * _K, 128, 8, head_dim=64) for tokens in (32, 128)),
)
_HEADLINE = (
    *_TABLE,
    *(Case(_K * _K, block, top_k, passes=passes) for passes in PASSES for block, top_k in ((4096, 12), (128, 8))),
    Case(4 * _K, 128, 8, batch=4),
    *(
        Case(tokens * _K, block, top_k, routing="skewed")
        for tokens in (32, 128)
        for block, top_k in ((128, 8), (512, 3))
    ),
    *(replace(case, passes="forward") for case in _TABLE),
)
_SETTINGS = ((128, 8), (512, 3), (256, 4), (2048, 3), (4096, 12))
_FULL = (
    *_HEADLINE,
    *(
        Case(tokens * _K, block, top_k, head_dim=width, batch=4 if tokens <= 4 else 1, passes=passes)
        for passes in reversed(PASSES)
        for width in (128, 64)
        for block, top_k in _SETTINGS
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ),
    *(Case(32 * _K, 128, 8, heads=heads, kv_heads=kv_heads) for heads, kv_heads in ((32, 32), (32, 1), (40, 8))),
    *(Case(32 * _K, 128, 8, head_dim=width) for width in (80, 96, 192, 256)),
    *(Case(32 * _K, block, top_k, dtype="float16") for block, top_k in ((128, 8), (512, 3))),
)
_CPU = tuple(
    Case(tokens * _K, block, top_k, head_dim=64, heads=8, kv_heads=8, dtype=dtype, passes=passes)
    for dtype in ("float32", "bfloat16")
    for tokens in (2, 4, 8, 16, 32)
    for block, top_k in ((128, 8), (512, 3))
    for passes in PASSES
)

_SHORT = tuple(
    Case(tokens, block, top_k, head_dim=width, batch=4)
    for tokens in (4 * _K, 2 * _K, _K, 512, 256)
    for width in (128, 64)
    # The last covers all blocks; so do others at the shortest lengths.
    for block, top_k in ((128, 8), (512, 3), (64, 4), (128, tokens // 128))
)
_PEERS = tuple(Case(tokens * _K, block, top_k) for tokens in (8, 32, 64) for block, top_k in ((128, 8), (512, 3)))

_ALL = {"headline": _HEADLINE, "full": _FULL, "short": _SHORT, "peers": _PEERS, "cpu": _CPU}
GRIDS = {name: tuple(dict.fromkeys(cases)) for name, cases in _ALL.items()}
"""Name -> cases, the most important first: a run that is cut short has them."""

PAGED = ((128, 8, (16, 128)), (512, 3, (512,)))
"""Block size, top-k and page sizes of caches in pages."""
