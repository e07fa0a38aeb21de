"""Two tables of docs/speed.md about training, with where their numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from openmoba.bench.rows import commits, length_name, markdown_table
from openmoba.bench.training.cases import TrainingRow
from openmoba.bench.training.table import ARMS, comparison, longest_windows


def training_document(rows: Sequence[TrainingRow], file: str, drawn: bool) -> str:
    """Write the comparison of `rows`, which are in `file`, and their figure if it is `drawn`; "" without any."""
    rows = [row for row in rows if not row.error]
    head, cells = comparison(rows)
    if not cells:
        return ""
    timed = [row for row in rows if row.kind == "loop"]
    first = timed[0]
    kernels = _named(row.attention_kernel or "?" for row in timed if row.block_size is None)
    return "\n".join(
        (
            f"One {first.device}, {first.power_limit_w:.0f} W: whole training steps, optimizer included, in tokens per "
            f"second. Random weights and tokens, vocabulary {first.vocabulary}, windows of {length_name(first.tokens)} "
            "tokens, fp32 weights under bf16 autocast, layers compiled. The columns from gain on compare "
            f"MoBA {ARMS[0]} with full attention. Operations count attention at its real reads; the measured "
            f"matrix rate is that of an 8192^3 product in the same run, {_rates(timed)} TFLOP/s. MFU in reports of "
            f"studies is a share of the data sheet's rate, and so smaller. Full attention ran {kernels}.",
            "",
            *markdown_table(head, cells),
            "",
            *(
                [f"![Tokens per second over the size of the model](../{file.removesuffix('.csv')}.png)", ""]
                if drawn
                else []
            ),
            f"Written by `openmoba bench training` at commit {commits(timed)}, torch {first.torch}, Triton "
            f"{first.triton}, transformers {first.transformers}: [{file}](../{file}).",
            "",
        )
    )


def longest_document(rows: Sequence[TrainingRow]) -> str:
    """Write the longest windows of `rows`; "" without any."""
    rows = [row for row in rows if row.kind == "longest" and not row.error]
    head, cells = longest_windows(rows)
    if not cells:
        return ""
    open_end = " `+`: a longer one was not tried, since a step would take too long." if "+" in str(cells) else ""
    return "\n".join(
        (
            f"The longest window, in tokens, to an eighth, that one {rows[0].device} trains, one window a step, and "
            f"how long that step takes.{open_end}",
            "",
            *markdown_table(head, cells),
            "",
            f"Commit {commits(rows)}.",
            "",
        )
    )


def _rates(rows: Sequence[TrainingRow]) -> str:
    """Write the rates of a matrix product beside the rows, lowest to highest."""
    rates = [row.matrix_tflops for row in rows if row.matrix_tflops]
    ends = [f"{end(rates):.0f}" for end in (min, max)] if rates else ["-"]
    return " to ".join(dict.fromkeys(ends))


def _named(kernels: Iterable[str]) -> str:
    """Say whose kernels these are; cuDNN's names say how they were generated, and nothing to a reader."""
    names = dict.fromkeys(kernels)
    return "cuDNN's kernels" if all(name.startswith("cudnn") for name in names) else f"`{'`, `'.join(names)}`"
