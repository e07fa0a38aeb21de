"""How many arguments a function of the operation takes, and how many fields a struct of its kernels has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

OPS = Path(__file__).parent.parent / "src" / "openmoba" / "ops"
MOST_ARGUMENTS, MOST_FIELDS = 16, 8


def parsed() -> Iterator[tuple[str, ast.AST]]:
    for path in OPS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            yield f"{path.relative_to(OPS)}:{getattr(node, 'name', '')}", node


def arguments(function: ast.FunctionDef) -> int:
    """Those of a kernel that are constants aside."""
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    kinds = ["" if argument.annotation is None else ast.unparse(argument.annotation) for argument in every]
    return sum(not kind.endswith(".constexpr") for kind in kinds)


def test_arguments_are_few() -> None:
    counts = {name: arguments(node) for name, node in parsed() if isinstance(node, ast.FunctionDef)}
    assert counts["triton/portable/keys.py:key_gradients"] > 10
    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}


def test_structs_are_small() -> None:
    structs = {
        name: sum(isinstance(field, ast.AnnAssign) for field in node.body)
        for name, node in parsed()
        if isinstance(node, ast.ClassDef) and _is_struct(node)
    }
    assert structs["triton/arguments.py:Call"] == structs["triton/geometry.py:Geometry"] == MOST_FIELDS
    assert {name: fields for name, fields in structs.items() if fields > MOST_FIELDS} == {}


def _is_struct(node: ast.ClassDef) -> bool:
    """A NamedTuple, or a dataclass, of the host's too."""
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    return "NamedTuple" in map(ast.unparse, node.bases) or "dataclass" in decorators
