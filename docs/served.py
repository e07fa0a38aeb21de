"""The table of docs/serving.md: tokens per second of vLLM with MoBA, beside the same engine with full attention."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from openmoba.bench.rows import length_name, markdown_table, short_commit
from openmoba.bench.training.table import rate_name

KEY_CONVOLUTION = "moba with key convolution"
"""What `benchmarks/serving.py` calls such rows."""

Rows = dict[tuple[str, int, int], dict[str, str]]
"""By attention, context and requests."""


def gains(root: Path, machine: str) -> Iterator[tuple[str, ...]]:
    """Yield the README's lines: the longest context, its prompts and the most requests at once."""
    rows = _rows(root, machine)
    if rows:
        context, batch = max((context, batch) for _, context, batch in rows)
        for what, column in (("a prompt", "prefill"), (f"decoding, {_requests(batch)}", "decode")):
            full, moba = _rates(rows, context, batch, f"{column}_tokens_per_s")
            rates = (f"{rate_name(rate)} tokens/s" for rate in (full, moba))
            yield (f"vLLM, twelve layers, {what}", length_name(context), *rates, f"{moba / full:.1f}x")


def speed(root: Path, machine: str) -> str:
    """Write prefill and decoding over the length of the context, for each batch; nothing before it was measured."""
    rows = _rows(root, machine)
    if not rows:
        return ""
    found = sorted({(context, batch) for _, context, batch in rows})
    contexts, batches = (sorted({case[i] for case in found}) for i in (0, 1))
    head = ["context", "prefill", *(f"decoding, {_requests(batch)}" for batch in batches)]
    cells = []
    for context in contexts:
        prefill = _gain(rows, context, batches[0], "prefill_tokens_per_s")
        decoding = [_gain(rows, context, batch, "decode_tokens_per_s") for batch in batches]
        cells.append([length_name(context), prefill, *decoding])
    first = rows["moba", contexts[0], batches[0]]
    origin = (
        f"Tokens per second with full attention and with MoBA, {_served(first)}, bf16; MoBA in every layer, blocks of "
        f"{first['block_size']}, top-{first['top_k']}. vLLM {first['vllm']}, torch {first['torch']}, "
        f"commit {short_commit(first['commit'])}: [results/{machine}/serving.csv](../results/{machine}/serving.csv), "
        f"by `benchmarks/serving.py`.{_with_key_convolution(rows)}"
    )
    return "\n".join([*markdown_table(head, cells), "", origin, ""])


def _rows(root: Path, machine: str) -> Rows:
    file = root / "results" / machine / "serving.csv"
    if not file.exists():
        return {}
    with file.open() as lines:
        return {(row["attention"], int(row["context"]), int(row["batch"])): row for row in csv.DictReader(lines)}


def _served(row: dict[str, str]) -> str:
    """Say on what it was measured, and what was served; as `benchmarks/serving.py` has it."""
    if row.get("gpu"):
        heads = "twelve layers, sixteen query and four key/value heads of width 128"
        return f"{row['gpu']}, in CUDA graphs as vLLM makes them by itself; {heads}"
    threads = f"{row['threads']} thread{'s' if row['threads'] != '1' else ''}"
    heads = "four layers, eight query and two key/value heads of width 64"
    return f"{row['cpu']}, {threads}, seconds of the processor; {heads}"


def _with_key_convolution(rows: Rows) -> str:
    """Say how much longer a step of decoding takes with key convolution, if that was measured."""
    times = [
        float(rows["moba", context, batch]["decode_tokens_per_s"]) / float(row["decode_tokens_per_s"])
        for (name, context, batch), row in rows.items()
        if name == KEY_CONVOLUTION
    ]
    if not times:
        return ""
    low, middle, high = min(times), median(times), max(times)
    return f" With key convolution over 4 tokens a step takes {middle:.2f} times as long ({low:.2f} to {high:.2f})."


def _requests(batch: int) -> str:
    return f"{batch} request{'s' if batch > 1 else ''}"


def _gain(rows: Rows, context: int, batch: int, column: str) -> str:
    full, moba = _rates(rows, context, batch, column)
    return f"{full:,.0f}, {moba:,.0f}: {moba / full:.1f}x"


def _rates(rows: Rows, context: int, batch: int, column: str) -> tuple[float, float]:
    """Return what full attention and MoBA have in a column."""
    full, moba = (float(rows[name, context, batch][column]) for name in ("full", "moba"))
    return full, moba
