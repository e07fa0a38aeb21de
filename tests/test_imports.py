"""Which module imports which: no circles, and families of kernels that do not know each other.

Imports in functions and for type checkers count too, unless a test says otherwise.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import imports
import pytest

MODULES = imports.modules(Path(__file__).parent.parent / "src")


def test_no_circle_of_imports() -> None:
    """Neither of modules, nor of folders: what one imports from beside it does not import the folder."""
    graph = imports.imports(MODULES)
    assert "openmoba.ops.triton.family" in graph["openmoba.ops.triton.families"]
    assert imports.nested_circles(graph, MODULES) == []


def test_families_of_kernels_do_not_import_each_other() -> None:
    """Nor does what they share import them: `families` alone knows all, which are the folders that it imports."""
    graph = imports.imports(MODULES)
    known = [name for name in graph["openmoba.ops.triton.families"] if name.count(".") == 3]
    families = {name.split(".")[3] for name in known if MODULES[name].stem == "__init__"}
    assert families >= {"portable", "hopper"}
    knowing = {
        name: its
        for name, its in graph.items()
        if name.startswith("openmoba.ops.triton.") and name != "openmoba.ops.triton.families"
    }
    assert len(knowing) > 20
    for name, its in knowing.items():
        own = name.split(".")[3]
        others = {other.split(".")[3] for other in its if other.count(".") >= 3} & families
        assert others <= {own}, name


def ways() -> list[list[str]]:
    """The ways from a call to its kernel that docs/architecture.md shows; one that begins with "..." is an end."""
    page = (Path(__file__).parent.parent / "docs/architecture.md").read_text()
    rows = [line for line in page.splitlines() if " → " in line]
    return [[f"openmoba.{name}" for name in re.findall(r"`(ops[\w.]*)`", row)] for row in rows]


@pytest.mark.parametrize("way", ways(), ids=lambda way: way[-1])
def test_a_call_is_followed_to_its_kernel_by_imports_alone(way: list[str]) -> None:
    graph = imports.imports(MODULES)
    assert len(way) > 1
    for module, imported in pairwise(way):
        assert imported in graph[module], f"{module} does not import {imported}"


def test_ways_end_where_kernels_are() -> None:
    ends = {way[-1].removeprefix("openmoba.ops.") for way in ways()}
    assert ends >= {"cpu", "triton.hopper.forward", "triton.hopper.keys", "triton.portable.forward"}
    assert {"triton.decode_kernels", "triton.ranking"} <= ends


def test_no_module_is_imported_by_a_string() -> None:
    """One is named by one: the profile's reader looks for kernels among the modules that are there."""
    assert imports.named(MODULES) == {("openmoba.bench.training.profiles", "openmoba.ops.triton")}


@pytest.mark.parametrize(
    ("text", "everywhere", "found"),
    [
        ("import a\nimport torch", False, {"a"}),
        ("from a import b, c", False, {"a", "a.b"}),
        ("from a import b", False, {"a.b"}),
        ("from a import c", False, {"a"}),
        ("def f():\n    import a", False, set()),
        ("def f():\n    import a", True, {"a"}),
        ("if TYPE_CHECKING:\n    import a", False, set()),
        ("if TYPE_CHECKING:\n    import a", True, {"a"}),
    ],
)
def test_imports_are_seen(text: str, everywhere: bool, found: set[str]) -> None:
    assert imports.imported(text, {"a", "a.b"}, everywhere) == found


def test_circles_are_found() -> None:
    assert imports.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert imports.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b - c"]


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"in.deep.a": "in.b", "in.c": "in.deep.a"}, []),  # a folder between two files
        ({"in.deep.a": "in.b", "in.b": "in.deep.d"}, ["in in: b - deep"]),  # no two files import each other
        ({"in.a": "in.b", "in.b": "in.a"}, ["in in: a - b"]),
        ({"in": "in.a", "in.a": "in"}, ["in in: __init__ - a"]),
        ({"in.a": "out.a", "out.b": "in.b"}, ["in openmoba: in - out"]),
        ({"in.a": "out.a", "out.a": "config"}, []),
    ],
)
def test_circles_of_folders_are_found(edges: dict[str, str], found: list[str]) -> None:
    folders = ("in", "in.deep", "out")
    files = ("in.a", "in.b", "in.c", "in.deep.a", "in.deep.d", "out.a", "out.b", "config")
    paths = {f"openmoba.{name}": Path("__init__.py" if name in folders else "file.py") for name in folders + files}
    graph = {name: set[str]() for name in paths}
    graph |= {f"openmoba.{name}": {f"openmoba.{other}"} for name, other in edges.items()}
    assert imports.nested_circles(graph, paths) == found


def test_code_and_parameters_are_counted() -> None:
    text = '"""A file."""\n\n# Why.\ndef f(a, *, b, N: tl.constexpr):\n    """Do."""\n    return """a\n    b"""\n'
    assert (imports.code_lines(text), imports.parameters(text)) == (3, 2)


def test_the_drawing_leaves_out_what_others_imply(tmp_path: Path) -> None:
    texts = {
        "low/__init__": "",
        "low/one": "",
        "mid/__init__": "",
        "mid/two": "from openmoba.low import one",
        "top": "from openmoba.low import one\nfrom openmoba.mid import two\nLATER = 'openmoba.late.three:run'",
        "late/__init__": "",
        "late/three": "",
        "alone": "",
    }
    for name, text in texts.items():
        path = tmp_path / "openmoba" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    arrows = imports.drawing(tmp_path).splitlines()[2:-1]
    assert [arrow.strip() for arrow in arrows] == ["mid --> low", "top --> mid", "top -.-> late"]
    assert "| top | 1 | 3 | 3 | 0 | low, mid |" in imports.report(tmp_path)
    assert imports.report(tmp_path).endswith("Import by a string: openmoba.top of openmoba.late.three")
