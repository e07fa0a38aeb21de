"""Which module imports which: no circles, and families of kernels that do not know each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "src"


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in (SOURCES / "openmoba").rglob("*.py"):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(text: str, names: set[str], everywhere: bool) -> set[str]:
    """The modules among `names` that a module imports when it is imported; in its functions as well if `everywhere`."""
    found: set[str] = set()
    for node in nodes(ast.parse(text), everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & names or {node.module}
    return found & names


def nodes(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not everywhere:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
        yield node
        yield from nodes(node, everywhere)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of the graph, its first name again at its end; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def imports(everywhere: bool) -> dict[str, set[str]]:
    names = set(modules())
    return {name: imported(path.read_text(), names, everywhere) - {name} for name, path in modules().items()}


def test_no_circle_of_imports() -> None:
    graph = imports(everywhere=False)
    assert "openmoba.ops.triton.family" in graph["openmoba.ops.triton.families"]
    assert circle(graph) == []


def test_families_of_kernels_do_not_import_each_other() -> None:
    """Nor does what they share import them: `families` alone knows both."""
    graph = imports(everywhere=True)
    families = {"portable", "hopper"}
    knowing = {
        name: its
        for name, its in graph.items()
        if name.startswith("openmoba.ops.triton.") and name != "openmoba.ops.triton.families"
    }
    for name, its in knowing.items():
        own = name.split(".")[3]
        others = {other.split(".")[3] for other in its if other.count(".") >= 3} & families
        assert others <= {own}, name


@pytest.mark.parametrize(
    ("text", "everywhere", "found"),
    [
        ("import a\nimport torch", False, {"a"}),
        ("from a import b, c", False, {"a.b"}),
        ("from a import c", False, {"a"}),
        ("def f():\n    import a", False, set()),
        ("def f():\n    import a", True, {"a"}),
        ("if TYPE_CHECKING:\n    import a", False, set()),
    ],
)
def test_imports_are_seen(text: str, everywhere: bool, found: set[str]) -> None:
    assert imported(text, {"a", "a.b"}, everywhere) == found


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
