"""Count what imports what, and draw it: folders, their files and lines, circles, and imports that hide in strings.

Code is lines that are not blank, comments or docstrings; parameters are those of the longest function, constexprs of a
kernel aside.

    python docs/imports.py [SRC]

prints the map of the package below SRC, `src` by default. An older one's, of commit C:

    git archive C src | tar -x -C /tmp && python docs/imports.py /tmp/src

Imports inside of functions count like all others: they too say which file must be read to understand another.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "openmoba"
ITSELF = "__init__"

Graph = Mapping[str, set[str]]
"""Module or folder -> what it imports, itself left out."""


def main(source: str = str(ROOT / "src")) -> None:
    print(report(Path(source)))


def report(source: Path) -> str:
    """Return the map as Markdown: a line per folder, then circles and imports by strings."""
    found = modules(source)
    graph, hidden = imports(found), named(found)
    folders = by_folder(graph, found)
    lines = ["| folder | files | lines | code | parameters | imports |", "| --- | --- | --- | --- | --- | --- |"]
    for name in sorted(folders):
        texts = [path.read_text() for module, path in found.items() if folder(module, found) == name]
        sizes = (sum(map(len, map(str.splitlines, texts))), sum(map(code_lines, texts)), max(map(parameters, texts)))
        cells = (name, len(texts), *sizes, ", ".join(sorted(folders[name])) or "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"Circle {circle}" for circle in nested_circles(graph, found) or ["nowhere"])]
    return "\n".join([*lines, "", *(f"Import by a string: {where} of {what}" for where, what in sorted(hidden))])


def drawing(source: Path, inside: str = "") -> str:
    """Draw as Mermaid what lies right below the folder `inside`, and which imports which.

    Arrows that others imply are left out, and so are single files, but for those at the top that import something.
    Dotted: by a string.
    """
    found = modules(source)
    graph, hidden = imports(found), named(found)
    nodes = level(inside, graph)
    shown = {one for one in nodes if _is_folder(source, inside, one) or (nodes[one] and not inside)} - {ITSELF}
    arrows = [f"{one} --> {other}" for one in sorted(shown) for other in sorted(_direct(one, nodes) & shown)]
    named_only = level(inside, {name: {other for one, other in hidden if one == name} for name in graph})
    arrows += [f"{one} -.-> {other}" for one in sorted(nodes) for other in sorted(named_only[one] - nodes[one])]
    return "\n".join(["```mermaid", "flowchart TD", *(f"    {arrow}" for arrow in arrows), "```", ""])


def folders_table(source: Path) -> str:
    """Write a line per folder: what it holds, by the first sentence of its docstring."""
    lines = ["| folder | what is in it |", "| --- | --- |"]
    for path in sorted((source / PACKAGE).rglob("*/__init__.py")):
        what = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        lines.append(f"| `{path.parent.relative_to(source / PACKAGE)}` | {' '.join(what.split())} |")
    return "\n".join([*lines, ""])


def _is_folder(source: Path, inside: str, name: str) -> bool:
    return (source / PACKAGE / inside / name).is_dir()


def level(inside: str, graph: Graph) -> dict[str, set[str]]:
    """Return what lies right below the folder `inside`, a folder below as one with all in it, and which imports which.

    The file `__init__.py` of `inside` is there by that name.
    """
    nodes: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if one := _below(inside, name):
            nodes.setdefault(one, set()).update(other for below in imported if (other := _below(inside, below)))
    return {one: others - {one} for one, others in nodes.items()}


def _below(inside: str, module: str) -> str | None:
    """Return the folder right below `inside` in which a module lies, or itself; None for what lies elsewhere."""
    parts = [*module.split(".")[1:], ITSELF]
    depth = len(inside.split("/")) if inside else 0
    return parts[depth] if "/".join(parts[:depth]) == inside else None


def _direct(name: str, graph: Graph) -> set[str]:
    """Return what `name` imports that nothing else which it imports reaches, circles aside."""
    reached = {other: _reached(other, graph) for other in graph[name]}
    implied = {one for one in reached for third in reached if one in reached[third] and third not in reached[one]}
    return graph[name] - implied


def modules(source: Path) -> dict[str, Path]:
    """Find every module of the package below `source`: dotted name -> file."""
    paths = sorted((source / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(found: Mapping[str, Path], everywhere: bool = True) -> dict[str, set[str]]:
    """Return which of the modules each imports; in functions and for type checkers too if `everywhere`."""
    return {module: imported(path.read_text(), found, everywhere) - {module} for module, path in found.items()}


def imported(text: str, found: Collection[str], everywhere: bool = True) -> set[str]:
    """Return the modules that the import statements of a file name; what is in a module counts as that module."""
    names: set[str] = set()
    for node in _nodes(ast.parse(text), everywhere):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"imports are absolute: {ast.unparse(node)}"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= below & set(found) | ({node.module} if below - set(found) else set())
    return names & set(found)


def named(found: Mapping[str, Path]) -> set[tuple[str, str]]:
    """Return which module names which other in a string, alone or before a colon and a name in it."""
    pairs = set()
    for module, path in found.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pairs.add((module, node.value.partition(":")[0]))
    return {(module, name) for module, name in pairs if name in found and name not in (module, PACKAGE)}


def _nodes(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    """Yield the nodes of a file, those that run when it is imported if not `everywhere`."""
    for node in ast.iter_child_nodes(tree):
        if not everywhere and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            continue
        yield node
        yield from _nodes(node, everywhere)


def code_lines(text: str) -> int:
    """Count the lines of a file that are neither blank nor comment nor docstring."""
    tree = ast.parse(text)
    words = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and i not in words for i, line in lines)


def parameters(text: str) -> int:
    """Count the parameters of the longest signature in a file, constexprs aside."""
    counts = [0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            counts.append(sum(not (one.annotation and "constexpr" in ast.unparse(one.annotation)) for one in every))
    return max(counts)


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


def nested_circles(graph: Graph, found: Mapping[str, Path]) -> list[str]:
    """Name the circles of every level, see `level`; modules that import each other are in one of them.

    A folder may so import what lies beside it, and be imported from there, but not by what it imports.
    """
    insides = sorted({"", *("/".join(name.split(".")[1:]) for name, path in found.items() if path.stem == ITSELF)})
    return [f"in {inside or PACKAGE}: {circle}" for inside in insides for circle in circles(level(inside, graph))]


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


if __name__ == "__main__":
    main(*sys.argv[1:])
