"""The cache of tokenised documents: read-only, damaged, of a writer that was killed, of a stranger."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from openmoba import cli
from openmoba.lab.config import RunConfig
from openmoba.lab.data import load as data_module
from openmoba.lab.measure.evaluate import evaluate_source
from openmoba.records import disk
from openmoba.records.locks import lock


def test_a_warm_cache_may_be_read_only(short: RunConfig, root: Path, tmp_path: Path, trained: Path) -> None:
    cache = shutil.copytree(root / "cache", tmp_path / "cache")
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for file in cache.glob("*.lock"):
        assert not os.access(file, os.W_OK) or os.geteuid() == 0
    before = sorted(path.stat().st_mtime_ns for path in (cache, *cache.rglob("*")))
    data_module.load_data(replace(short.data, cache=str(cache)))
    assert sorted(path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))) == before, "nothing was written"


def test_a_folder_elsewhere_is_not_said_to_be_the_cache(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", "/home/nobody/.cache/datasets")

    with pytest.raises(PermissionError, match=r"/home/nobody/\.cache"):
        data_module.cached(tmp_path / "cache", "name", write)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*cache: Not a directory; set data\.cache"):
        data_module.cached(tmp_path / "file" / "cache", "name", write)


def test_a_strangers_run_makes_no_cache_where_it_says(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = disk.read_json(copied / "config.json")
    stored["data"]["cache"] = str(tmp_path / "somewhere")
    disk.write_json(copied / "config.json", stored)
    assert cli.main(["evaluate", str(copied)]) == 0
    evaluate_source(str(copied))
    assert not (tmp_path / "somewhere").exists()
    assert (tmp_path / ".data").exists()


def test_a_cache_keeps_nothing_of_a_writer_that_was_killed(short: RunConfig, tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / "cache" / f".partial-{name}").mkdir(parents=True)
    with lock(tmp_path / "cache" / "alive.lock"):
        data_module.load_data(replace(short.data, cache=str(tmp_path / "cache")))
    assert [path.name for path in (tmp_path / "cache").glob(".partial-*")] == [".partial-alive"]


def test_a_damaged_cache_is_named(short: RunConfig, tmp_path: Path) -> None:
    data = replace(short.data, cache=str(tmp_path / "cache"))
    data_module.load_data(data)
    (tokens,) = (tmp_path / "cache").glob("tokens-*/tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"tokens\.npy is damaged .*; delete the folder .*tokens-\w+-\w+, it is made"):
        data_module.load_data(data)
    (sizes,) = (tmp_path / "cache").glob("documents-*/sizes.npy")
    sizes.write_bytes(b"")
    with pytest.raises(ValueError, match=r"sizes\.npy is damaged"):
        data_module.load_data(data)
