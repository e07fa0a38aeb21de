"""The tables and the figure of README.md, written from the files under results/.

    python docs/tables.py

replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` by what the function of that name returns,
which is nothing where the results are not there. A test compares README.md with what this would write.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from openmoba.bench.cases import GRIDS
from openmoba.bench.table import Row, length_name, read_rows

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


def with_tables(text: str) -> str:
    """`text` with all its tables written anew; KeyError for a name without a function."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def figure() -> str:
    """The figure of the first screen: the first one that there is."""
    found = [f"![{caption}]({path})\n" for path, caption in FIGURES.items() if (ROOT / path).exists()]
    return found[0] if found else ""


def attention_h200() -> str:
    """MoBA, the fastest dense attention and FlashMoBA on one GPU: the headline cases, random routing."""
    path = ROOT / "results" / "h200" / "attention.csv"
    rows = read_rows(path)
    rows = [row for row in rows if (row.device, row.commit) == (rows[-1].device, rows[-1].commit)]
    found = {(row.contender, *_settings(row)): row for row in rows if row.error is None}
    cells = []
    for case in GRIDS["headline"]:
        settings = _settings(Row.of("moba", case))
        mine, peer = found.get(("moba", *settings)), found.get(("flash_moba", *settings))
        if mine is None or case.routing != "random" or case.batch > 1:
            continue
        cells.append(
            (
                case.passes,
                case.head_dim,
                f"{case.block_size} / {case.top_k}",
                length_name(case.tokens),
                _ms(mine.p50_ms),
                _ms(mine.dense_ms),
                "-" if mine.speedup is None else f"{mine.speedup:.1f}x",
                _ms(peer.p50_ms if peer else None),
            )
        )
    if not cells:
        return ""
    last = rows[-1]
    head = ("passes", "D", "block / top-k", "tokens", "MoBA", "fastest dense", "speed-up", "FlashMoBA")
    return "\n".join(
        (
            "## Attention on a GPU",
            "",
            f"One {last.device}, {last.power_limit_w:.0f} W, bf16, batch 1, 32 query and 8 key/value heads, causal, "
            "normal random inputs. Medians in ms of the whole public call, choice of blocks included. Dense attention "
            "is timed up to 256K tokens.",
            "",
            *_markdown(head, cells),
            "",
            f"Written by `openmoba bench attention --out results/h200/attention.csv` at commit {_short(last.commit)}, "
            f"torch {last.torch}, Triton {last.triton}. All rows are in "
            "[results/h200/attention.csv](results/h200/attention.csv), the method in "
            "[benchmarks/README.md](benchmarks/README.md).",
            "",
        )
    )


def attention_cpu() -> str:
    """MoBA and causal SDPA on a CPU, forward and backward."""
    path = ROOT / "results" / "cpu" / "attention.csv"
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["pass"] == "forward+backward"]
    dense = {(row["dtype"], row["tokens"]): row for row in rows if row["implementation"] == "sdpa"}
    cells = [
        (
            row["dtype"],
            f"{row['block_size']} / {row['top_k']}",
            length_name(int(row["tokens"])),
            _ms(float(row["p50_ms"])),
            _ms(float(dense[row["dtype"], row["tokens"]]["p50_ms"])),
            f"{float(row['ratio']):.1f}x",
        )
        for row in rows
        if row["implementation"] == "moba" and int(row["tokens"]) >= CPU_TOKENS
    ]
    last = rows[-1]
    head = ("dtype", "block / top-k", "tokens", "MoBA", "causal SDPA", "speed-up")
    return "\n".join(
        (
            "## Attention on a CPU",
            "",
            f"{last['cpu']}, {last['threads']} threads, batch 1, {last['heads']} heads, width {last['width']}, causal. "
            "Medians in ms of forward and backward.",
            "",
            *_markdown(head, cells),
            "",
            f"Written by `python benchmarks/cpu_attention.py` at commit {_short(last['commit'])}, "
            f"torch {last['torch']}. "
            "All rows are in [results/cpu/attention.csv](results/cpu/attention.csv); "
            "[benchmarks/README.md](benchmarks/README.md) also has shorter lengths, the forward alone, and memory.",
            "",
        )
    )


def study() -> str:
    """The charts of the committed study, with what its report says of their origin."""
    report = ROOT / STUDY / "report.md"
    if not report.exists():
        return ""
    text = report.read_text()
    origin = dict(re.findall(r"^- (Commit|Hardware|Training and evaluation, all runs): (.*)$", text, re.MULTILINE))
    charts = re.findall(r"!\[.*?\]\((\S+\.png)\)", text)
    return "\n".join(
        (
            f"[{text.splitlines()[0].removeprefix('# ')}]({STUDY}/report.md), the outcome of one `make demo`: "
            f"{origin['Hardware']}; {origin['Training and evaluation, all runs']}; commit {_short(origin['Commit'])}.",
            "",
            *(f"![{CHARTS[name]}]({STUDY}/{chart})" for name in CHARTS for chart in charts if name in chart),
            "",
        )
    )


STUDY = "results/demo"
CHARTS = {
    "scaling-law": "Trailing loss over compute, with the fitted laws of MoBA and full attention",
    "layerwise-hybrid": "Trailing loss over the number of full layers, between MoBA and full attention",
}
FIGURES = {
    "results/h200/attention-speedup.png": "Times faster than the fastest dense attention, over length",
    f"{STUDY}/figures/pretrain-scaling-law.png": CHARTS["scaling-law"],
}
"""Path -> what it shows, the preferred one first."""

TABLES: dict[str, Callable[[], str]] = {
    "figure": figure,
    "attention_h200": attention_h200,
    "attention_cpu": attention_cpu,
    "study": study,
}

CPU_TOKENS = 8192


def _settings(row: Row) -> tuple[object, ...]:
    """What a row was measured on, device and commit apart."""
    shape = (row.passes, row.tokens, row.batch, row.heads, row.kv_heads, row.head_dim, row.dtype)
    return (*shape, row.block_size, row.top_k, row.routing)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = (head, ("---",) * len(head), *rows)
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _short(commit: str | None) -> str:
    return (commit or "unknown")[:10]


if __name__ == "__main__":
    main()
