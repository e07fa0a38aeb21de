"""Tables of speed and memory, written from the rows of the benchmarks below results/.

Every table takes the root of the repository, and is empty where the rows are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import served

from openmoba.bench.cases import GRIDS, PASSES, Case
from openmoba.bench.cited import Beside, beside
from openmoba.bench.contenders import contender_label
from openmoba.bench.rows import commits, length_name, markdown_table, newest, read_rows, short_commit
from openmoba.bench.table import Row, compared, dense_names
from openmoba.bench.training.cases import TrainingRow
from openmoba.bench.training.document import longest_document, training_document
from openmoba.bench.training.table import ARMS, rate_name
from openmoba.ops.cost import causal_pairs, moba_pairs

CITED = "cited-peers.csv"
HEADLINE = ("D", "block / top-k", "tokens", "forward", "both passes", "dense", "speed-up", "FlashMoBA")
CPU_TOKENS = 8192
"""Shortest length in the table."""
DECODE_TOKENS = (2**15, 2**17, 2**19)
SPEED = (128, 8)
"""Block size and top-k of the README's table."""


def opening(root: Path, machine: str) -> str:
    """Say what a stranger should care about: one call's time beside full attention's, and what it leaves out."""
    rows = [row for row in _attention_rows(root, machine) if row.tokens == 2**17]
    if not rows:
        return ""
    row = rows[0]
    share = moba_pairs(row.tokens, row.block_size or 1, row.top_k or 1) / causal_pairs(row.tokens)
    dense = _dense(root, rows, f"results/{machine}/attention.csv").partition(",")[0].removesuffix(".")
    return (
        f"**With openmoba, attention over {length_name(row.tokens)} tokens takes {_ms(row)} ms forward and backward, "
        f"where full attention takes {_dense_ms(row)} ms on the same {row.device}: it reads {share:.1%} of the "
        "pairs of query and key.** "
        f"{dense.replace('Dense attention', 'Full attention')}.{_peers(root, machine, row)}\n"
    )


def speed(root: Path, machine: str) -> str:
    """Write the README's one table: attention, decoding and training beside full attention."""
    attention, steps, models = (
        _attention_rows(root, machine),
        _decode_rows(root, machine),
        _trained_models(root, machine),
    )
    if not attention:
        return ""
    first = attention[0]
    card = (
        f"One {first.device}, {first.power_limit_w:.0f} W, bf16, medians, choice of blocks included; attention and "
        f"layers of {first.heads} query and {first.kv_heads} key/value heads of width {first.head_dim}."
    )
    arm = f"; in training {', top-'.join(ARMS[0].split('/'))}" if models else ""
    return _table(
        ("what", "tokens", "full attention", "MoBA", "gain"),
        [*_speed(attention, steps, models), *served.gains(root, machine)],
        f"{card} Blocks of {SPEED[0]}, top-{SPEED[1]}{arm}. Commits, versions, commands and every row: "
        "[docs/speed.md](docs/speed.md), of vLLM [docs/serving.md](docs/serving.md).\n",
    )


def attention(root: Path, machine: str) -> str:
    """Write the attention of one GPU: times, share of the roofline, extra memory, and where they come from."""
    file = f"results/{machine}/attention.csv"
    pairs = _headline(root, file)
    if not pairs:
        return ""
    last = pairs[0].shown
    return _table(
        (*HEADLINE, "roofline", "MB forward", "MB backward"),
        [(*pair.cells, *pair.costs) for pair in pairs],
        f"One {last.device}, {last.power_limit_w:.0f} W, torch {last.torch}, Triton {last.triton}, commit "
        f"{commits(_shown_rows(pairs))}: {_source(file)}. Medians in ms. The columns from dense on are of both "
        f"passes, or of the forward where it alone was measured. {_dense(root, _shown_rows(pairs), file)} MB are extra "
        "memory, 10^6 bytes.\n",
    )


def short(root: Path, machine: str) -> str:
    """Write the short sequences, where the host counts as much as the GPU."""
    file = f"results/{machine}/short.csv"
    rows = [row for row in _measured(root, file, "moba", "short").values() if row.dense_ms]
    if not rows:
        return ""
    head = ("D", "tokens", "block / top-k", "MoBA", "dense", "MoBA - dense", "MoBA / dense", "path")
    cells = [
        (
            row.head_dim,
            f"{row.batch} x {length_name(row.tokens)}",
            _blocks(row),
            _ms(row),
            _dense_ms(row),
            f"{(row.p50_ms or 0) - (row.dense_ms or 0):+.2f}",
            f"{(row.p50_ms or 0) / (row.dense_ms or 1):.2f}",
            (row.path or "").split()[-1],
        )
        for row in rows
    ]
    dense = _dense(root, rows, file)
    origin = f"{rows[0].device}, forward and backward, medians in ms. {dense} Commit {commits(rows)}.\n"
    return _table(head, cells, origin)


def flex(root: Path, machine: str) -> str:
    """Write FlexAttention, with the mask of MoBA's choice, beside MoBA."""
    file = f"results/{machine}/attention.csv"
    ours, theirs = (_measured(root, file, contender, "peers") for contender in ("moba", "flex"))
    pairs = [(ours[case], row) for case, row in theirs.items() if case in ours]
    if not pairs:
        return ""
    head = ("D", "block / top-k", "tokens", "MoBA", "FlexAttention", "ratio")
    cells = [
        (row.head_dim, _blocks(row), length_name(row.tokens), _ms(mine), _ms(row), f"{row.p50_ms / mine.p50_ms:.1f}x")
        for mine, row in pairs
        if mine.p50_ms and row.p50_ms
    ]
    measured = commits(row for pair in pairs for row in pair)
    origin = f"{pairs[0][0].device}, forward and backward, medians in ms. Commit {measured}.\n"
    return _table(head, cells, origin)


def cited(root: Path, machine: str) -> str:
    """Write MoBA beside contenders that were timed apart."""
    lines = _beside(root, machine)
    if not lines:
        return ""
    head = ("D", "block / top-k", "tokens", "MoBA", *lines[0].names, "ratio", "ratio")
    cells = [
        (
            line.row.head_dim,
            _blocks(line.row),
            length_name(line.row.tokens),
            _ms(line.row),
            *(_number(peer.ms if peer else None) for peer in line.peers),
            *line.ratios,
        )
        for line in lines
    ]
    first = next(peer for line in lines for peer in line.peers if peer)
    origin = (
        f"Forward and backward, ms. MoBA: commit {commits(line.row for line in lines)}. The others: {first.device}, "
        f"torch {first.torch}, {first.date}, by a script that was not kept: {_source(f'results/{machine}/{CITED}')}.\n"
    )
    return _table(head, cells, origin)


def decode(root: Path, machine: str) -> str:
    """Write a decoding step over a cache."""
    file = f"results/{machine}/decode.csv"
    steps = _decode_rows(root, machine)
    if not steps:
        return ""
    first = steps[0]
    head = ("batch", "block / top-k", "cached tokens", "MoBA", "dense", "speed-up")
    cells = [(r.batch, _blocks(r), length_name(r.tokens), _ms(r), _dense_ms(r), _speedup(r)) for r in steps]
    origin = (
        f"One attention layer, one token per sequence: one {first.device}, bf16, {first.heads} query and "
        f"{first.kv_heads} key/value heads, D {first.head_dim}. Medians in ms, replayed from a CUDA graph. "
        f"{_dense(root, steps, file)} Commit {commits(steps)}, torch {first.torch}, Triton {first.triton}: "
        f"{_source(file)}.\n"
    )
    return _table(head, cells, origin)


def paged(root: Path, machine: str) -> str:
    """Write what a cache in pages takes beside a contiguous one."""
    file = f"results/{machine}/paged.csv"
    rows = [row for row in _newest_rows(root, file) if row.error is None]
    contiguous = {(row.passes, row.batch, row.tokens, _blocks(row)): row for row in rows}
    cells = []
    for row in rows:
        what, _, page_size = row.passes.partition(", pages of ")
        beside = contiguous.get((what, row.batch, row.tokens, _blocks(row)))
        if page_size and beside:
            ratio = f"{(row.p50_ms or 0) / (beside.p50_ms or 1):.2f}"
            cells.append(
                (what, row.batch, length_name(row.tokens), _blocks(row), page_size, _ms(beside), _ms(row), ratio)
            )
    if not cells:
        return ""
    first = rows[0]
    head = ("call", "batch", "cached tokens", "block / top-k", "page", "contiguous", "in pages", "ratio")
    origin = (
        f"One attention layer: one {first.device}, bf16, {first.heads} query and {first.kv_heads} key/value heads, "
        f"D {first.head_dim}. Medians in ms. Commit {commits(rows)}, torch {first.torch}, Triton {first.triton}: "
        f"{_source(file)}.\n"
    )
    return _table(head, cells, origin)


def prefill(root: Path, machine: str) -> str:
    """Write the times of the first and last chunk of a long prompt."""
    rows = [row for row in _newest_rows(root, f"results/{machine}/decode.csv") if row.error is None]
    lines = []
    for chunks in _by_setting(row for row in rows if row.passes == "prefill chunk"):
        begin, end = chunks[0], chunks[-1]
        lines.append(
            f"{end.device}: a prompt of {length_name(end.tokens)} tokens in chunks of {length_name(begin.tokens)}, "
            f"block / top-k {_blocks(begin)}, takes {_ms(begin)} ms for the first chunk and {_ms(end)} ms for the "
            f"last. Commit {short_commit(end.commit)}.\n"
        )
    return "".join(lines)


def training(root: Path, machine: str) -> str:
    """Write the training steps of the headline's models: what a user gains end to end."""
    return training_document(*_training(root, machine))


def longest(root: Path, machine: str) -> str:
    """Write the longest window that fits on one card."""
    return longest_document(_training(root, machine)[0])


def attention_cpu(root: Path) -> str:
    """Write MoBA and causal SDPA on a CPU, forward and backward."""
    file = "results/cpu/attention.csv"
    rows = [row for row in _newest_rows(root, file) if (row.contender, row.passes) == ("moba", PASSES[1])]
    rows = [row for row in rows if row.tokens >= CPU_TOKENS]
    if not rows:
        return ""
    cells = [
        (row.dtype, f"{row.block_size} / {row.top_k}", length_name(row.tokens), _ms(row), _dense_ms(row), _speedup(row))
        for row in rows
    ]
    head = ("dtype", "block / top-k", "tokens", "MoBA", "causal SDPA", "speed-up")
    first = rows[0]
    origin = (
        f"{first.device}, batch 1, {first.heads} heads, width {first.head_dim}, causal. Medians in ms of forward and "
        f"backward. Commit {commits(rows)}, torch {first.torch}: {_source(file)}, which also has shorter lengths and "
        "the forward alone.\n"
    )
    return _table(head, cells, origin)


class Pair(NamedTuple):
    """MoBA's rows of one case, forward alone and with backward, and FlashMoBA's beside the latter."""

    forward: Row | None
    both: Row | None
    peer: Row | None

    @property
    def shown(self) -> Row:
        """The row that is compared."""
        row = self.both or self.forward
        assert row is not None
        return row

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of `HEADLINE`."""
        row = self.shown
        setting = (str(row.head_dim), _blocks(row), length_name(row.tokens))
        return (*setting, _ms(self.forward), _ms(self.both), _dense_ms(row), _speedup(row), _ms(self.peer))

    @property
    def costs(self) -> tuple[str, ...]:
        """Share of the roofline, and memory of each pass."""
        row = self.shown
        memory = ("-" if mb is None else f"{mb:.0f}" for mb in (row.forward_mb, row.backward_mb))
        return ("-" if row.roofline is None else f"{row.roofline:.0%}", *memory)


def _headline(root: Path, name: str) -> list[Pair]:
    """Read the measured headline cases of one sequence and random routing."""
    rows = {replace(row, device=None, commit=None).key: row for row in _newest_rows(root, name)}

    def measured(contender: str, case: Case, passes: str) -> Row | None:
        row = rows.get(Row.of(contender, replace(case, passes=passes)).key)
        return row if row and row.error is None else None

    cases = [case for case in GRIDS["headline"] if case.routing == "random" and case.batch == 1]
    pairs = []
    for case in dict.fromkeys(replace(case, passes=PASSES[1]) for case in cases):
        forward, both = (measured("moba", case, passes) for passes in PASSES)
        if forward or both:
            pairs.append(Pair(forward, both, measured("flash_moba", case, PASSES[1] if both else PASSES[0])))
    return pairs


def _attention_rows(root: Path, machine: str) -> list[Row]:
    """Return the README's rows of attention: both passes, D 128, the setting `SPEED`, dense attention beside."""
    rows = [
        pair.both for pair in _headline(root, f"results/{machine}/attention.csv") if pair.both and pair.both.dense_ms
    ]
    return [row for row in rows if (row.head_dim, row.block_size, row.top_k) == (128, *SPEED)]


def _table(head: Sequence[str], cells: Sequence[Sequence[object]], origin: str) -> str:
    """Return a table as Markdown, and below it where its numbers come from."""
    return "\n".join((*markdown_table(head, cells), "", origin))


def _speed(
    attention: Sequence[Row], steps: Sequence[Row], models: Sequence[tuple[TrainingRow, TrainingRow]]
) -> Iterator[tuple[str, ...]]:
    """Yield the lines of `speed` that come from this project's own benchmarks; of decoding the two longest."""
    batched = [row for row in steps if row.batch > 1 and (row.block_size, row.top_k) == SPEED][-2:]
    named = [("attention, forward and backward", row) for row in attention]
    named += [(f"a decoding step of one layer, batch {row.batch}", row) for row in batched]
    for what, row in named:
        yield (what, length_name(row.tokens), f"{_dense_ms(row)} ms", f"{_ms(row)} ms", _speedup(row))
    for full, moba in models:
        rates = (full.tokens_per_second, moba.tokens_per_second)
        what = f"a training step, {full.size.upper()} parameters"
        times = (f"{rate_name(rate)} tokens/s" for rate in rates)
        yield (what, length_name(full.tokens), *times, f"{(rates[1] or 0) / (rates[0] or 1):.1f}x")


def _decode_rows(root: Path, machine: str) -> list[Row]:
    """Return the decoding steps of the documents, by batch and length."""
    rows = _newest_rows(root, f"results/{machine}/decode.csv")
    steps = [row for row in rows if row.contender == "moba" and row.error is None and row.passes == "decode"]
    shown = [row for row in steps if row.tokens in DECODE_TOKENS]
    return sorted(shown, key=lambda row: (row.batch, row.tokens))


def _trained_models(root: Path, machine: str) -> list[tuple[TrainingRow, TrainingRow]]:
    """Return the training of each size of Llama with full attention, and with MoBA at the setting compared first."""
    rows = [
        row for row in _training(root, machine)[0] if row.kind == "loop" and row.layers == "compiled" and not row.error
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


def _source(file: str) -> str:
    """Return a link from a page in docs/ to the rows behind it."""
    return f"[{file}](../{file})"


def _training(root: Path, machine: str) -> tuple[list[TrainingRow], str, bool]:
    """Read the newest row of every training case; return them, their file, and whether it has been drawn."""
    file = f"results/{machine}/training.csv"
    return newest(read_rows(root / file, TrainingRow)), file, (root / file).with_suffix(".png").exists()


def _beside(root: Path, machine: str) -> list[Beside]:
    """Read the headline's cases of which there are figures of others."""
    rows = [pair.both for pair in _headline(root, f"results/{machine}/attention.csv") if pair.both]
    timed = {row.contender for row in _newest_rows(root, f"results/{machine}/attention.csv") if row.p50_ms}
    return beside(rows, root / f"results/{machine}/{CITED}", timed)


def _peers(root: Path, machine: str, row: Row) -> str:
    """Say what other code, timed apart, took on the case of `row`; "" without figures."""
    line = next((line for line in _beside(root, machine) if line.row == row), None)
    if line is None:
        return ""
    told = [
        f" {what} by {peer.label} took {_number(peer.ms)} ms, {ratio.removesuffix('x')} times as long."
        for what, peer, ratio in zip(("Full attention", "MoBA"), line.peers, line.ratios, strict=True)
        if peer
    ]
    first = next(peer for peer in line.peers if peer)
    apart = f"were timed apart, on another {first.device} on {first.date}."
    return f" [Others](docs/speed.md#others) {apart}{''.join(told)}"


def _measured(root: Path, name: str, contender: str, grid: str) -> dict[Case, Row]:
    """Read a contender's rows of a grid by case, in the grid's order, failures left out."""
    rows = {replace(row, device=None, commit=None).key: row for row in _newest_rows(root, name) if row.error is None}
    return {case: rows[key] for case in GRIDS[grid] if (key := Row.of(contender, case).key) in rows}


def _shown_rows(pairs: Sequence[Pair]) -> list[Row]:
    return [row for pair in pairs for row in (pair.both, pair.forward) if row]


def _newest_rows(root: Path, name: str) -> list[Row]:
    """Read the newest row of every case; none without the file."""
    rows = newest(read_rows(root / name, Row))
    return [compared(row, rows) for row in rows]


def _dense(root: Path, rows: Sequence[Row], name: str) -> str:
    """Say which dense attention `rows` are compared with, and which others were slower."""
    timed = [
        row for row in _newest_rows(root, name) if row.block_size is None and row.passes in {row.passes for row in rows}
    ]
    fastest = dense_names(rows, timed)
    others = dict.fromkeys(row.contender for row in timed if row.p50_ms and row.contender not in fastest)
    slower = f", faster than {'; '.join(map(contender_label, others))}" if others else ""
    return f"Dense attention is {'; '.join(map(contender_label, fastest)) or 'not timed'}{slower}."


def _by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows by block size and top-k, in the order of tokens."""
    settings: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.tokens):
        settings.setdefault(_blocks(row), []).append(row)
    return list(settings.values())


def _blocks(row: Row) -> str:
    return f"{row.block_size} / {row.top_k}"


def _ms(row: Row | None) -> str:
    return _number(row.p50_ms if row else None)


def _dense_ms(row: Row) -> str:
    return _number(row.dense_ms)


def _speedup(row: Row) -> str:
    return "-" if row.speedup is None else f"{row.speedup:.1f}x"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"
