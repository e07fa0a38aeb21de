"""Draw the README's picture: which keys each query reads, by full attention and by MoBA.

    python docs/picture.py

writes docs/keys-read.svg. The picture is computed, not drawn by hand: with the identity as values, an attention's
output is its weights, and a key was read where the weight is not zero. A test compares the file with what this writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from openmoba import moba_attention

PICTURE = Path(__file__).parent / "keys-read.svg"

TOKENS, BLOCK, TOP_K = 128, 8, 3
PASSAGES = "a9 b14 a3 c17 b6 d12 a7 c5 e15 b9 d10 a8 c13"
"""What the text is about, and for how many tokens. A query looks for keys of its own topic."""
QUERY = 110
"""The query whose row is pointed at."""

CELL, LEFT, TOP, GAP = 2.5, 12, 52, 64
SIDE = int(TOKENS * CELL)
WIDTH, HEIGHT = 2 * (LEFT + SIDE) + GAP, TOP + SIDE + 66
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
.title { font-weight: 600; fill: #24292f } .grid { stroke: #afb8c1; stroke-width: 0.5 }
.unread { fill: #d0d7de; fill-opacity: 0.45 } .own { fill: #0969da } .chosen { fill: #e16f24 }
.query { fill: none; stroke: #24292f; stroke-width: 1.2 }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa4ae } .title { fill: #e6edf3 } .grid { stroke: #484f58 }
  .unread { fill: #6e7681; fill-opacity: 0.3 } .own { fill: #539bf5 } .chosen { fill: #f0883e }
  .query { stroke: #e6edf3 }
}
"""


def main() -> None:
    PICTURE.write_text(picture())


def picture() -> str:
    """Return the picture as SVG, readable on light and on dark pages."""
    causal_TS = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    read_TS = keys_read(TOP_K)
    assert keys_read(TOKENS // BLOCK).equal(causal_TS)
    share = read_TS.sum().item() / causal_TS.sum().item()
    right = LEFT + SIDE + GAP
    label = f"MoBA, blocks of {BLOCK}, top-{TOP_K}, reads {share:.0%}"
    block_T = torch.arange(TOKENS) // BLOCK
    own_TS = causal_TS & (block_T[:, None] == block_T)
    chosen_TS = read_TS & ~own_TS
    alternative = (
        f"Two triangles of queries by keys. Full attention reads all {causal_TS.sum()} pairs. MoBA reads "
        f"{own_TS.sum()} pairs in the queries' own blocks and {chosen_TS.sum()} in the past blocks that score best."
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img">',
            f"<title>{alternative}</title>",
            f"<style>{STYLE}</style>",
            *_panel(LEFT, "Full attention reads every past key", {"own": causal_TS}),
            *_panel(right, label, {"unread": causal_TS & ~read_TS, "own": own_TS, "chosen": chosen_TS}),
            *_legend(right),
            "</svg>\n",
        )
    )


def keys_read(top_k: int) -> Tensor:
    """Return which keys each query reads, bool `[queries, keys]`, as `openmoba.moba_attention` itself reads them."""
    torch.manual_seed(0)
    topics = "".join(passage[0] * int(passage[1:]) for passage in PASSAGES.split())
    topic_T = torch.tensor([ord(name) - ord("a") for name in topics])
    x_TD = torch.nn.functional.one_hot(topic_T, TOKENS) + 0.05 * torch.randn(TOKENS, TOKENS)
    x, values = x_TD[None, :, None], torch.eye(TOKENS)[None, :, None]
    return moba_attention(x, x, values, block_size=BLOCK, top_k=top_k)[0, :, 0] > 0


def _panel(left: int, title: str, cells: dict[str, Tensor]) -> Iterator[str]:
    """Draw one square of queries (down) by keys (to the right), from a mask for each colour."""
    yield f'<text class="title" x="{left}" y="18">{title}</text>'
    yield f'<text x="{left}" y="42">keys →</text>'
    yield f'<text transform="translate({left + SIDE + 16} {TOP}) rotate(90)">queries →</text>'
    for name, cells_TS in cells.items():
        yield f'<path class="{name}" d="{"".join(_runs(left, cells_TS))}"/>'
    edges = (n * CELL for n in range(0, TOKENS + 1, BLOCK))
    lines = (f"M{left + edge:g} {TOP}v{SIDE}M{left} {TOP + edge:g}h{SIDE}" for edge in edges)
    yield f'<path class="grid" d="{"".join(lines)}"/>'
    row = TOP + QUERY * CELL
    yield f'<rect class="query" x="{left - 2}" y="{row - 2}" width="{SIDE + 4}" height="{CELL + 4}"/>'


def _runs(left: int, cells_TS: Tensor) -> Iterator[str]:
    """Draw the true cells of every row, neighbours as one rectangle."""
    for row, cells in enumerate(cells_TS.tolist()):
        for read, run in groupby(range(TOKENS), lambda key, cells=cells: cells[key]):
            keys = list(run)
            if read:
                size = len(keys) * CELL
                yield f"M{left + keys[0] * CELL:g} {TOP + row * CELL:g}h{size:g}v{CELL}h-{size:g}z"


def _legend(right: int) -> Iterator[str]:
    """Draw what colours and the outlined row mean, below the squares."""
    y = TOP + SIDE + 24
    for x, name, words in (
        (LEFT, "own", "read: the own block, up to the query"),
        (LEFT + 262, "chosen", f"read: the {TOP_K - 1} past blocks that score best"),
        (right + 176, "unread", "not read"),
    ):
        yield f'<rect class="{name}" x="{x}" y="{y - 10}" width="12" height="12"/>'
        yield f'<text x="{x + 18}" y="{y}">{words}</text>'
    yield f'<rect class="query" x="{LEFT}" y="{y + 15}" width="12" height="8"/>'
    yield f'<text x="{LEFT + 18}" y="{y + 24}">one query; it scores the mean key of each past block</text>'


if __name__ == "__main__":
    main()
