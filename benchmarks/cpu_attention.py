"""MoBA on CPU against PyTorch's attention in the same process: times, ratios and peak memory.

Three contestants take turns, so that drift of the machine meets all alike: MoBA, causal SDPA, and (below 8K tokens)
SDPA given MoBA's mask. Rows hold the 20th, 50th and 80th percentile of the times in ms; `ratio` is causal SDPA's median
over the row's. `extra_mb` is the peak of the process's memory over what it held before forward + backward.

    python benchmarks/cpu_attention.py

writes `results/cpu/attention.csv`, the same with every single time to `results/cpu/attention_times.jsonl`, and the
table in `benchmarks/README.md`. It takes about eight minutes on two cores, which should have nothing else to do;
lengths that met a busy machine (p20 and p80 far apart) are measured again with `--tokens` and `--dtypes`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openmoba import moba_attention, moba_select
from openmoba.ops.reference import attention_mask

ROOT = Path(__file__).parent.parent
SETTINGS = ((512, 3), (128, 8))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKED_BELOW = 8192
PASSES = ("forward", "forward+backward")
SHOWN = ("tokens", "dtype", "implementation", "block_size", "top_k", "pass", "p20_ms", "p50_ms", "p80_ms", "ratio")
BEGIN, END = "<!-- cpu_attention: written by cpu_attention.py -->", "<!-- cpu_attention: end -->"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Contestant = tuple[str, int | None, int | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15, help="time to spend on each length and dtype")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu")
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for dtype in options.dtypes:
        for tokens in options.tokens:
            rows = list(measure(options, tokens, dtype))
            for row in rows:
                print(" ".join(f"{key}={row[key]}" for key in SHOWN))
            write(options, rows)


def write(options: argparse.Namespace, new: list[dict[str, Any]]) -> None:
    """Put rows into all three files, in place of those of the same length and dtype."""
    times = options.out / "attention_times.jsonl"
    rows = [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else []
    cases = {(row["dtype"], row["tokens"]) for row in new}
    rows = [row for row in rows if (row["dtype"], row["tokens"]) not in cases] + new
    rows.sort(key=lambda row: (list(DTYPES).index(row["dtype"]), row["tokens"]))
    times.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(options.out / "attention.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "ms"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    write_table(options.readme, rows)


def measure(options: argparse.Namespace, tokens: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Measure all contestants at one length; rows, with the times they come from as `ms`."""
    torch.manual_seed(0)
    q, k, v, d_out = (
        torch.randn(1, tokens, heads, options.width).to(DTYPES[dtype])
        for heads in (options.heads, options.kv_heads, options.kv_heads, options.heads)
    )
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    contestants: dict[Contestant, Attention] = {("sdpa", None, None): causal}
    for block_size, top_k in SETTINGS:
        if tokens > block_size * top_k:
            contestants["moba", block_size, top_k] = moba(block_size, top_k)
            if tokens < MASKED_BELOW:
                contestants["sdpa+mask", block_size, top_k] = masked(q, k, block_size, top_k)
    times = take_turns(contestants, inputs, d_out, options.seconds)
    median = {name: percentile(times["sdpa", None, None][name], 0.5) for name in PASSES}
    for contestant, attention in contestants.items():
        implementation, block, chosen = contestant
        extra_mb = peak_memory(attention, inputs, d_out)
        for name, ms in times[contestant].items():
            p20, p50, p80 = (percentile(ms, p) for p in (0.2, 0.5, 0.8))
            yield {
                "implementation": implementation,
                "dtype": dtype,
                "tokens": tokens,
                "heads": options.heads,
                "kv_heads": options.kv_heads,
                "width": options.width,
                "block_size": block,
                "top_k": chosen,
                "pass": name,
                "p20_ms": round(p20, 2),
                "p50_ms": round(p50, 2),
                "p80_ms": round(p80, 2),
                "ratio": round(median[name] / p50, 2),
                "repeats": len(ms),
                "extra_mb": extra_mb if name == PASSES[1] else None,
                "threads": options.threads,
                "torch": torch.__version__,
                "cpu": processor(),
                "commit": commit(),
                "ms": ms,
            }


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def moba(block_size: int, top_k: int) -> Attention:
    return lambda q, k, v: moba_attention(q, k, v, block_size=block_size, top_k=top_k, impl="cpu")


def masked(q: Tensor, k: Tensor, block_size: int, top_k: int) -> Attention:
    """Make SDPA with MoBA's mask; neither the choice nor the mask is timed."""
    selected = moba_select(q, k, block_size=block_size, top_k=top_k)
    mask = attention_mask(selected, k.shape[1], block_size)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return attention


def take_turns(
    contestants: dict[Contestant, Attention], inputs: tuple[Tensor, ...], d_out: Tensor, seconds: float
) -> dict[Contestant, dict[str, list[float]]]:
    """Time each contestant in ms, per pass: one round to warm up, then three or more as time permits."""
    times: dict[Contestant, dict[str, list[float]]] = {name: {p: [] for p in PASSES} for name in contestants}
    for attention in contestants.values():
        run(attention, inputs, d_out)
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 50 and time.perf_counter() - start < seconds):
        for name, attention in contestants.items():
            for part, ms in zip(PASSES, run(attention, inputs, d_out), strict=True):
                times[name][part].append(round(ms, 3))
        rounds += 1
    return times


def run(attention: Attention, inputs: tuple[Tensor, ...], d_out: Tensor) -> tuple[float, float]:
    """Return the milliseconds of the forward, and of forward and backward."""
    start = time.perf_counter()
    out = attention(*inputs)
    forward = time.perf_counter()
    torch.autograd.grad(out, inputs, d_out)
    return 1e3 * (forward - start), 1e3 * (time.perf_counter() - start)


def percentile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def peak_memory(attention: Attention, inputs: tuple[Tensor, ...], d_out: Tensor) -> int | None:
    """Measure the MB that forward + backward add at their peak; None where the system does not tell."""
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_kb("VmRSS")
    run(attention, inputs, d_out)
    return (status_kb("VmHWM") - before) // 1024


def status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def write_table(readme: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what lies between the markers of `readme`, or append it."""
    text = readme.read_text() if readme.exists() else "# Benchmarks\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before.rstrip()}\n\n{BEGIN}\n{table(rows)}{END}\n{after.lstrip()}")


def table(rows: list[dict[str, Any]]) -> str:
    """Write Markdown: a line per length, dtype and setting; times are medians of forward / forward + backward."""
    first, commits = rows[0], ", ".join(sorted({row["commit"] for row in rows}))
    lines = [
        "## Attention on CPU",
        "",
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, commit {commits}: "
        f"{first['heads']} query heads, {first['kv_heads']} key/value heads, width {first['width']}, batch 1. "
        "Medians in ms of forward / forward + backward; ratios are causal SDPA's time over MoBA's. SDPA with MoBA's "
        "mask has a quadratic mask and is timed below 8K. Memory is what forward + backward add at their peak.",
        "",
        "    python benchmarks/cpu_attention.py",
        "",
        "| tokens | dtype | block / top-k | MoBA | causal SDPA | SDPA + mask | ratio | MoBA, SDPA extra MB |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (dtype, tokens), group in groupby(rows, key=lambda row: (row["dtype"], row["tokens"])):
        found = {(r["implementation"], r["block_size"], r["top_k"], r["pass"]): r for r in group}
        settings = [key[1:3] for key in found if key[0] == "moba" and key[3] == PASSES[1]]
        for setting in settings:
            mine, dense, mask = (
                [found.get((name, *at, p)) for p in PASSES]
                for name, at in (("moba", setting), ("sdpa", (None, None)), ("sdpa+mask", setting))
            )
            cells = [" / ".join(f"{r['p50_ms']:.0f}" if r else "-" for r in x) for x in (mine, dense, mask)]
            ratio = " / ".join(f"{r['ratio']:.2f}" for r in mine if r)
            memory = ", ".join(str(x[1]["extra_mb"]) for x in (mine, dense) if x[1])
            lines.append(
                f"| {tokens} | {dtype} | {setting[0]} / {setting[1]} | {' | '.join(cells)} | {ratio} | {memory} |"
            )
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    main()
