"""Imports go one way, between the rooms of the package and between those of the laboratory."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import imports
import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    ("limits", "errors", "hub", "config"),
    ("ops",),
    ("__init__",),
    ("parallel",),
    ("vllm",),
    ("hf",),
    ("records",),
    ("lab.__init__", "lab.arms", "lab.columns", "lab.config", "lab.errors", "lab.progress", "lab.run_files"),
    ("lab.data",),
    ("lab.model",),
    ("lab.measure",),
    ("lab.train",),
    ("lab.study",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
"""The rooms in order: what stands in one imports from its own line and from those above."""


def place_of(module: str) -> int:
    """The place in the order of a module below the package."""
    for place, rooms in enumerate(ROOMS):
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return place
    raise AssertionError(f"{module} is in no room; give it a place in ROOMS")


def test_imports_go_one_way() -> None:
    found = imports.modules(ROOT / "src")
    names = {module: below(module, path) for module, path in found.items()}
    wrong = []
    for module, imported in imports.imports(found).items():
        own = place_of(names[module])
        wrong += [f"{module} imports {other}" for other in imported if place_of(names[other]) > own]
    assert wrong == []


def below(module: str, path: Path) -> str:
    """The name below the package: `lab.data.load`, `ops.__init__`."""
    inner = module.partition(".")[2]
    return ".".join(filter(None, (inner, "__init__"))) if path.stem == "__init__" else inner


def test_rooms_are_told_apart() -> None:
    assert place_of("lab.train.run") > place_of("lab.data.load") > place_of("lab.config") > place_of("ops.api")
    with pytest.raises(AssertionError, match=r"attic\.old is in no room"):
        place_of("attic.old")


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
        "from openmoba import cli; print(cli.main(['--version']), cli.main(['train', 'run']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"sdpa", "moba", "sdpa_mask"} <= set(re.findall(r"^(\w+) .* ms$", done.stderr, re.MULTILINE)), done.stderr
    assert "| 16 | 16/2 | 64 | forward |" in done.stdout
    assert done.stdout.endswith("0 2\n"), "the version is said, and what training lacks"
    assert "pip install 'openmoba[lab]' installs what the laboratory needs" in done.stderr
