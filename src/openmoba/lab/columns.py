"""Tables and numbers for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align a table: columns as wide as they must be, the first to the left, the others to the right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def short(count: float) -> str:
    """Write a count as a person says it: 950, 14.2 M, 1.5 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.3g}"


def counted(count: int, name: str) -> str:
    """Write how many there are of what has this name: 1 run, 2,000 runs."""
    return f"{count:,} {name}{'s' * (count != 1)}"


def gigabytes(count: float) -> str:
    """Write bytes in GB, to two digits: 0.65 GB, 38 GB, 1,100 GB."""
    return f"{float(f'{count / 1e9:.2g}'):,.12g} GB"
