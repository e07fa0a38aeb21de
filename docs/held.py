"""Draw the picture of docs/parallel.md: which process holds which tokens of which heads.

    python docs/held.py

writes docs/held.svg. Chunks and their owners are those of `openmoba.parallel.Sharding`. A test compares the file with
what this writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from openmoba.parallel import Sharding

PICTURE = Path(__file__).parent / "held.svg"

RANKS, HEADS = 3, 6
COLORS = ("#0969da", "#e16f24", "#2da44e")
CELL, LEFT, TOP, GAP = 22, 16, 56, 40
CHUNKS = 2 * RANKS
SIDE = CELL * CHUNKS
PANELS = (
    ("before and after", "contiguous shards"),
    ("by heads, within", "all tokens of some heads"),
    ("before and after", "head-tail shards"),
    ("by keys, a turn", "keys of one head, for all"),
)
WIDTH, HEIGHT = LEFT + len(PANELS) * (SIDE + GAP), TOP + CELL * HEADS + 66
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
.title { font-weight: 600; fill: #24292f } .none { fill: #d0d7de; fill-opacity: 0.45 } rect { stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa4ae } .title { fill: #e6edf3 } .none { fill: #6e7681; fill-opacity: 0.3 }
}
"""


def main() -> None:
    PICTURE.write_text(picture())


def picture() -> str:
    """Return the picture as SVG, readable on light and on dark pages."""
    label = (
        "Four grids of tokens by heads, coloured by process. Contiguous shards: each process holds a third of the "
        "tokens, all heads. By heads: all tokens of a third of the heads. Head-tail shards: a sixth from the start and "
        "a sixth from the end. By keys: in a turn every process holds all keys of one head."
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
    ]
    for number, (title, text) in enumerate(PANELS):
        x = LEFT + number * (SIDE + GAP)
        lines += [f'<text class="title" x="{x}" y="20">{title}</text>', f'<text x="{x}" y="40">{text}</text>']
        lines += [_cell(x, chunk, head, owner) for chunk, head, owner in _owners(number)]
        lines.append(f'<text x="{x}" y="{TOP + CELL * HEADS + 20}">tokens to the right, heads down</text>')
    y = HEIGHT - 12
    for rank, color in enumerate(COLORS):
        lines.append(f'<rect x="{LEFT + 110 * rank}" y="{y - 12}" width="14" height="14" fill="{color}"/>')
        lines.append(f'<text x="{LEFT + 110 * rank + 20}" y="{y}">process {rank}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _owners(panel: int) -> Iterator[tuple[int, int, int | None]]:
    """Yield chunk, head, and the process that holds it; for the keys of a turn, all do, which is none of them alone."""
    layout = "head-tail" if panel == 2 else "contiguous"
    shardings = [Sharding(CHUNKS, rank, RANKS, "", layout) for rank in range(RANKS)]
    owner = {place: s.rank for s in shardings for start, end in s.stretches for place in range(start, end)}
    for chunk in range(CHUNKS):
        for head in range(HEADS):
            if panel == 1:
                yield chunk, head, head * RANKS // HEADS
            elif panel == 3:
                yield chunk, head, -1 if head == 0 else None
            else:
                yield chunk, head, owner[chunk]


def _cell(x: int, chunk: int, head: int, owner: int | None) -> str:
    """Draw one cell; one that all processes hold has a stripe of each."""
    left, top = x + chunk * CELL, TOP + head * CELL
    if owner is None:
        return f'<rect class="none" x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}"/>'
    height = (CELL - 2) / (RANKS if owner < 0 else 1)
    owners = range(RANKS) if owner < 0 else (owner,)
    return "".join(
        f'<rect x="{left}" y="{top + i * height:.1f}" width="{CELL - 2}" height="{height:.1f}" fill="{COLORS[rank]}"/>'
        for i, rank in enumerate(owners)
    )


if __name__ == "__main__":
    main()
