"""The benchmark of paged caches: what is timed, rows, resuming. Nothing here asserts a speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openmoba import moba_attention
from openmoba.bench import __main__ as module_main
from openmoba.bench import cases, decode
from openmoba.bench.attention import Session
from openmoba.bench.commands import Paged
from openmoba.bench.decode import Cache, Shape, told
from openmoba.bench.machine import fill
from openmoba.bench.paged import PagedCache, markdown, paged_tasks
from openmoba.bench.rows import read_rows
from openmoba.bench.table import Row

CPU = torch.device("cpu")
SMALL = Shape(64, 2, heads=4, kv_heads=2, head_dim=16, dtype="float32")


@pytest.fixture(autouse=True)
def _quick(quick_timing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PAGED", ((16, 2, (8, 32)),))


def test_pages_hold_the_cache() -> None:
    cache = Cache(SMALL, CPU)
    q = torch.randn(2, 5, 4, 16)
    expected = moba_attention(q, cache.k, cache.v, block_size=16, top_k=2)
    for page_size in (8, 32):
        step = PagedCache(cache, page_size, 16).step(q, 2)
        torch.testing.assert_close(step().view_as(expected), expected)


def test_rows_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "paged.csv"

    def rows() -> list[Row]:
        session = Session(CPU, "abc", read_rows(out, Row))
        tasks = [*paged_tasks(session, SMALL, None), *paged_tasks(session, SMALL, 32)]
        return fill(out, session.rows, tasks, minutes=None, told=told)

    first = rows()
    names = [
        f"{passes}{pages}" for passes in ("decode", "chunk of 32") for pages in ("", ", pages of 8", ", pages of 32")
    ]
    assert [row.passes for row in first] == names
    assert all(row.p50_ms and row.block_size == 16 for row in first)
    assert read_rows(out, Row) == first
    monkeypatch.setattr(decode, "measure", None)
    assert rows() == first
    table = markdown(first)
    assert f"| {first[1].p50_ms / first[0].p50_ms:.2f} |" in table


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"--lengths must be a multiple of 32 tokens, the largest page, got 40"):
        Paged(lengths=(64, 40))
    with pytest.raises(ValueError, match=r"--chunk must be part of the --prefill of 64 tokens, got 96"):
        Paged(lengths=(64,), prefill=64, chunk=96)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU answers")
def test_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        module_main.main(["paged", "--out", str(tmp_path / "paged.csv")])
