"""Count what imports what, and draw it: folders, their files and lines, circles, and imports that hide in strings.

    python docs/imports.py [SRC]

prints the map of the package below SRC, `src` by default. An older one's, of commit C:

    git archive C src | tar -x -C /tmp && python docs/imports.py /tmp/src

Imports inside of functions count like all others: they too say which file must be read to understand another.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "openmoba"

Graph = Mapping[str, set[str]]
"""Module or folder -> what it imports, itself left out."""


def main(source: str = str(ROOT / "src")) -> None:
    print(report(Path(source)))


def report(source: Path) -> str:
    """Return the map as Markdown: a line per folder, then circles and imports by strings."""
    found = modules(source)
    graph, hidden = imports(found)
    folders = by_folder(graph, found)
    lines = ["| folder | files | lines | imports |", "| --- | --- | --- | --- |"]
    for name in sorted(folders):
        paths = [path for module, path in found.items() if folder(module, found) == name]
        length = sum(len(path.read_text().splitlines()) for path in paths)
        lines.append(f"| {name} | {len(paths)} | {length} | {', '.join(sorted(folders[name])) or '-'} |")
    named = [f"{what}: {circle}" for what, of in (("modules", graph), ("folders", folders)) for circle in circles(of)]
    lines += ["", *(f"Circle of {circle}" for circle in named or ["nothing"])]
    return "\n".join([*lines, "", *(f"Import by a string: {where} of {what}" for where, what in sorted(hidden))])


def modules(source: Path) -> dict[str, Path]:
    """Find every module of the package below `source`: dotted name -> file."""
    paths = sorted((source / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(found: Mapping[str, Path]) -> tuple[dict[str, set[str]], set[tuple[str, str]]]:
    """Return which of the modules each imports, and which it names in a string that is imported or looks like it."""
    graph: dict[str, set[str]] = {}
    hidden = set()
    for module, path in found.items():
        tree = ast.parse(path.read_text())
        graph[module] = {name for name in _imported(tree, found) if name != module}
        hidden |= {(module, name) for name in _named(tree, found) if name != module}
    return graph, hidden


def folder(module: str, found: Mapping[str, Path]) -> str:
    """Return the folder of a module below the package; the package's own files stand for themselves."""
    inside = found[module].stem != "__init__"
    parts = module.split(".")[1:]
    return "/".join(parts[:-1] if inside and len(parts) > 1 else parts) or "__init__"


def by_folder(graph: Graph, found: Mapping[str, Path]) -> dict[str, set[str]]:
    """Bring what modules import to folders."""
    folders: dict[str, set[str]] = {}
    for module, imported in graph.items():
        name = folder(module, found)
        folders.setdefault(name, set()).update({folder(other, found) for other in imported} - {name})
    return folders


def circles(graph: Graph) -> list[str]:
    """Name every group whose members import each other, directly or through others."""
    reached = {name: _reached(name, graph) for name in graph}
    groups = {frozenset({name} | {other for other in reached[name] if name in reached[other]}) for name in graph}
    return sorted(" - ".join(sorted(group)) for group in groups if len(group) > 1)


def _reached(start: str, graph: Graph) -> set[str]:
    """Return all that `start` imports, directly or through others."""
    reached: set[str] = set()
    left = [start]
    while left:
        new = graph.get(left.pop(), set()) - reached
        reached |= new
        left += new
    return reached


def _imported(tree: ast.Module, found: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that import statements name; a name out of a module counts as that module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in found)
        elif isinstance(node, ast.ImportFrom) and node.module in found:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in found else str(node.module) for name in inner)


def _named(tree: ast.Module, found: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that strings name, alone or before a colon and a name in them; docstrings aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name in found and name != PACKAGE:
                yield name


if __name__ == "__main__":
    main(*sys.argv[1:])
