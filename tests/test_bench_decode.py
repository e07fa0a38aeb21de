"""The decode benchmark: rows, resuming, figures. Nothing here asserts a speed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from openmoba.bench import __main__ as module_main
from openmoba.bench import decode
from openmoba.bench.attention import Session
from openmoba.bench.commands import Decode
from openmoba.bench.decode import (
    CHUNK,
    DENSE,
    EAGER,
    GRAPH,
    Cache,
    Shape,
    check_chunk,
    decode_tasks,
    prefill_tasks,
    told,
)
from openmoba.bench.decode_charts import prefill_chart, step_chart
from openmoba.bench.machine import fill
from openmoba.bench.rows import append_row, read_rows
from openmoba.bench.table import Row
from openmoba.cli import main

CPU = torch.device("cpu")
SMALL = Shape(64, 2, heads=4, kv_heads=2, head_dim=16, dtype="float32")


@pytest.fixture(autouse=True)
def _quick(quick_timing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SETTINGS", ((16, 2), (8, 3)))


def measured(out: Path, *kinds: Callable[[Session], Iterator[Any]]) -> list[Row]:
    session = Session(CPU, "abc", read_rows(out, Row))
    tasks = chain.from_iterable(tasks(session) for tasks in kinds)
    return fill(out, session.rows, tasks, minutes=None, told=told)


def steps(session: Session) -> Iterator[Any]:
    return decode_tasks(session, SMALL)


def chunks(session: Session) -> Iterator[Any]:
    return prefill_tasks(session, replace(SMALL, batch=1), 32)


def test_rows_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "decode.csv"
    rows = measured(out, steps, chunks)
    assert read_rows(out, Row) == rows
    assert [(row.contender, row.passes, row.block_size) for row in rows if row.contender == "moba"] == [
        *(("moba", EAGER, size) for size in (16, 8)),
        *(("moba", CHUNK, size) for size in (16, 16, 8, 8)),
    ]
    assert [row.tokens for row in rows if row.passes == CHUNK] == [32, 64] * 2
    dense = [row for row in rows if row.contender in DENSE]
    assert len(dense) == len(DENSE)
    assert any(row.error for row in dense)  # backends that a CPU does not have
    best = min(row.p50_ms for row in dense if row.p50_ms is not None)
    for row in rows:
        if row.passes == EAGER and row.contender == "moba":
            assert row.dense_ms == best
            assert row.speedup == pytest.approx(best / row.p50_ms, rel=1e-4)
    monkeypatch.setattr(decode, "measure", None)
    monkeypatch.setattr(decode, "Cache", None)
    assert measured(out, steps) == rows[: len(dense) + 2]
    assert measured(out, chunks) == rows[len(dense) + 2 :]


def test_a_cache_is_made_once_and_given_back_with_its_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Cache]] = []

    class Counted(Cache):
        def __init__(self, *arguments: Any) -> None:
            assert [cache() for cache in made] in ([], [None])
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(decode, "Cache", Counted)
    monkeypatch.setattr(decode, "DENSE", {})
    measured(tmp_path / "decode.csv", steps, chunks)
    assert [cache() for cache in made] == [None, None]


def test_a_file_holds_chunks_of_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.csv"
    measured(out, chunks)
    check_chunk(32, out)
    assert main(["bench", "decode", "--chunk", "16", "--out", str(out)]) == 2
    assert "holds chunks of 32 tokens, got chunk=16" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--chunk must be >= 1, got 0"):
        Decode(chunk=0)


def test_contenders_attend_to_the_cache() -> None:
    """With as many blocks as there are, MoBA is dense attention; grouped heads are the same function."""
    cache = Cache(SMALL, CPU)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (cache.q, cache.k, cache.v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    backend = torch.nn.attention.SDPBackend.MATH
    torch.testing.assert_close(cache.moba(16, 4)(), expected)
    torch.testing.assert_close(cache.dense(backend, False)(), expected.transpose(1, 2))
    torch.testing.assert_close(cache.dense(backend, True)().reshape(expected.shape), expected)


def test_what_a_graph_reads_lives_as_long_as_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses alone: without the tensors it would read what comes to lie there."""
    centroids = torch.ones(3)
    alive = weakref.ref(centroids)
    monkeypatch.setattr(torch, "cuda", MagicMock())
    replay = decode.replayed(partial(torch.neg, centroids))
    del centroids
    assert alive() is not None
    assert replay().equal(-torch.ones(3))


def test_figures(tmp_path: Path) -> None:
    out = tmp_path / "decode.csv"
    for tokens in (64, 128):
        for batch in (1, 2):
            shape = replace(SMALL, tokens=tokens, batch=batch)
            for name, settings, time in (("moba", (16, 2), 1.0), ("moba", (8, 3), 2.0), ("sdpa_flash", None, 3.0)):
                append_row(out, replace(shape.row(name, GRAPH, settings), p50_ms=time * tokens, device="card"))
            append_row(out, replace(shape.row("moba", CHUNK, (16, 2)), p50_ms=9.0, device="card"))
    rows = read_rows(out, Row)
    panels = step_chart(rows).axes
    assert [panel.get_title() for panel in panels] == ["batch 1", "batch 2"]
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[0].get_lines()}
    assert lines == {"openmoba 8/3": [128, 256], "openmoba 16/2": [64, 128], "dense, SDPA/flash": [192, 384]}
    assert "64" in prefill_chart(rows).axes[0].get_ylabel()
    assert main(["bench", "plot", str(out)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"decode-step.png", "decode-prefill.png"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU answers")
def test_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        module_main.main(["decode", "--lengths", "64", "128", "--out", str(tmp_path / "decode.csv")])
    assert main(["bench", "decode"]) == 2
