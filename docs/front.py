"""The README's first sentence and its one table: one call and one training step beside full attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import peers
import served
from cells import (
    decode_rows,
    dense_ms,
    dense_sentence,
    headline,
    ms,
    newest_rows,
    speedup,
    table,
    training_rows,
)

from openmoba.bench.contenders import contender_label
from openmoba.bench.rows import length_name
from openmoba.bench.table import Row, dense_names
from openmoba.bench.training.cases import TrainingRow
from openmoba.bench.training.table import ARMS, rate_name
from openmoba.ops.cost import causal_pairs, moba_pairs

SETTING = (128, 8)
"""Block size and top-k of attention and decoding."""


def opening(root: Path, machine: str) -> str:
    """Say what a stranger should care about: one call's time beside full attention's, and what it leaves out."""
    rows = [row for row in _attention(root, machine) if row.tokens == 2**17]
    if not rows:
        return ""
    row = rows[0]
    share = moba_pairs(row.tokens, row.block_size or 1, row.top_k or 1) / causal_pairs(row.tokens)
    dense = dense_sentence(root, rows, f"results/{machine}/{peers.DENSE}").replace(
        "Dense attention", "Full attention there"
    )
    return (
        f"**With openmoba, attention over {length_name(row.tokens)} tokens takes {ms(row)} ms forward and backward, "
        f"where full attention takes {dense_ms(row)} ms on the same {row.device}: it reads {share:.1%} of the "
        f"pairs of query and key.** {dense}{peers.peer(root, machine, row)}\n"
    )


def speed(root: Path, machine: str) -> str:
    """Write the README's one table: attention, decoding and training beside full attention."""
    attention, steps, models = (
        _attention(root, machine),
        decode_rows(root, machine),
        _trained_models(root, machine),
    )
    if not attention:
        return ""
    first, timed = attention[0], newest_rows(root, f"results/{machine}/{peers.DENSE}")
    card = (
        f"One {first.device}, {first.power_limit_w:.0f} W, bf16, medians, choice of blocks included; attention and "
        f"layers of {first.heads} query and {first.kv_heads} key/value heads of width {first.head_dim}."
    )
    arm = f"; in training {', top-'.join(ARMS[0].split('/'))}" if models else ""
    return table(
        ("what", "tokens", "full attention", "MoBA", "gain"),
        [
            *((f"attention, forward and backward (full: {_fastest(row, timed)})", *_gain(row)) for row in attention),
            *_speed(steps, models),
            *served.gains(root, machine),
        ],
        f"{card} Blocks of {SETTING[0]}, top-{SETTING[1]}{arm}. Commits, versions, commands and every row: "
        "[docs/speed.md](docs/speed.md), of vLLM [docs/serving.md](docs/serving.md).\n",
    )


def _speed(steps: Sequence[Row], models: Sequence[tuple[TrainingRow, TrainingRow]]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of decoding, the two longest, and of training."""
    for row in [row for row in steps if row.batch > 1 and (row.block_size, row.top_k) == SETTING][-2:]:
        yield (f"a decoding step of one layer, batch {row.batch}", *_gain(row))
    for full, moba in models:
        rates = (full.tokens_per_second, moba.tokens_per_second)
        what = f"a training step, {full.size.upper()} parameters"
        times = (f"{rate_name(rate)} tokens/s" for rate in rates)
        yield (what, length_name(full.tokens), *times, f"{(rates[1] or 0) / (rates[0] or 1):.1f}x")


def _gain(row: Row) -> tuple[str, ...]:
    """Return the cells of `speed` behind a line's name."""
    return (length_name(row.tokens), f"{dense_ms(row)} ms", f"{ms(row)} ms", speedup(row))


def _fastest(row: Row, timed: Sequence[Row]) -> str:
    """Name the dense attention that a row of the README is compared with."""
    return "; ".join(map(contender_label, dense_names([row], timed)))


def _attention(root: Path, machine: str) -> list[Row]:
    """Return the README's rows of attention: both passes, D 128, the setting `SETTING`, dense attention beside."""
    rows = [
        pair.both for pair in headline(root, f"results/{machine}/{peers.DENSE}") if pair.both and pair.both.dense_ms
    ]
    return [row for row in rows if (row.head_dim, row.block_size, row.top_k) == (128, *SETTING)]


def _trained_models(root: Path, machine: str) -> list[tuple[TrainingRow, TrainingRow]]:
    """Return the training of each size of Llama with full attention, and with MoBA at the setting compared first."""
    rows = [
        row
        for row in training_rows(root, machine)[0]
        if row.kind == "loop" and row.layers == "compiled" and not row.error
    ]
    found: dict[str, dict[str, TrainingRow]] = {}
    for row in rows:
        if row.family == "llama":
            found.setdefault(row.size, {}).setdefault(f"{row.batch} {row.arm}", row)
    pairs = []
    for size in found.values():
        batch = next(iter(size)).partition(" ")[0]
        if f"{batch} full" in size and f"{batch} {ARMS[0]}" in size:
            pairs.append((size[f"{batch} full"], size[f"{batch} {ARMS[0]}"]))
    return pairs
