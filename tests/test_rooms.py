"""Imports go one way, between the rooms of the package and between those of the laboratory."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "openmoba"
ROOMS = (
    ("limits", "errors", "hub", "config"),
    ("ops",),
    ("__init__",),
    ("hf", "parallel"),
    ("records",),
    ("lab.__init__", "lab.arms", "lab.columns", "lab.config", "lab.errors", "lab.progress"),
    ("lab.data",),
    ("lab.model",),
    ("lab.measure",),
    ("lab.train",),
    ("lab.study",),
    ("bench",),
    ("cli",),
)
"""The rooms in order: what stands in one imports from it and from those above. One line has rooms apart, but the first
and the laboratory's own files, which are single modules."""


def module_of(path: Path) -> str:
    """The dotted name below the package: `lab.data.load`, `ops.__init__`."""
    return ".".join(path.relative_to(SOURCES).with_suffix("").parts)


def room_of(module: str) -> tuple[int, str]:
    """The place in the order and the room of a module below the package."""
    for place, rooms in enumerate(ROOMS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return place, room
    raise AssertionError(f"{module} is in no room; give it a place in ROOMS")


def imports(path: Path) -> Iterator[str]:
    """What a file imports of the package, in functions too: dotted names below it; `__init__` is the package itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if re.match(r"openmoba(\.|$)", name):
                yield below(name)


def below(name: str) -> str:
    """The module below the package that a dotted name lies in."""
    parts = name.split(".")[1:]
    while parts:
        place = SOURCES.joinpath(*parts)
        if place.is_dir() or place.with_suffix(".py").exists():
            return ".".join(parts) + (".__init__" if place.is_dir() else "")
        parts.pop()
    return "__init__"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in SOURCES.rglob("*.py"):
        own, room = room_of(module_of(path))
        for name in imports(path):
            place, other = room_of(name)
            apart = place == own and room != other and place not in (0, 5)
            if place > own or apart:
                wrong.append(f"{module_of(path)} imports {name}")
    assert wrong == []


def test_an_import_in_a_function_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("def f():\n    from openmoba.lab.train import run\n    from openmoba import moba_attention\n")
    assert list(imports(file)) == ["lab.train.run", "__init__"]
    assert room_of("lab.train.run") > room_of("lab.data.load") > room_of("lab.config") > room_of("ops.api")
    with pytest.raises(AssertionError, match=r"attic\.old is in no room"):
        room_of("attic.old")


def test_timing_attention_needs_torch_alone(tmp_path: Path) -> None:
    """`python -m openmoba.bench` where nothing of what the laboratory asks for can be imported."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lab"]
    names = sorted(re.split(r"[<>=]", name)[0] for name in extras)
    assert {"transformers", "datasets", "numpy", "tyro"} <= set(names)
    program = (
        f"import sys, warnings; sys.modules.update(dict.fromkeys({names}))\n"
        "warnings.simplefilter('ignore')\n"
        "from openmoba.bench import __main__, attention, cases, decode\n"
        "small = cases.Case(64, 16, 2, head_dim=16, heads=1, kv_heads=1, dtype='float32', passes='forward')\n"
        "cases.GRIDS['cpu'] = (small,)\n"
        f"__main__.main(['attention', '--grid', 'cpu', '--out', {str(tmp_path / 'rows.csv')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count(" ms")) == (0, 2), done.stderr
    assert "| 16 | 16/2 | 64 | forward |" in done.stdout
