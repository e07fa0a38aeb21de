"""How many arguments a function of the operation takes, how many fields a struct has, and what is written once."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest

import openmoba
from openmoba.ops import api
from openmoba.ops.arguments import Blocking, KeyCache, KeyPages

OPS = Path(__file__).parent.parent / "src" / "openmoba" / "ops"
MOST_ARGUMENTS, MOST_FIELDS, MOST_OF_A_STRUCT = 16, 8, 3
VERBS = {"api.py", "explain.py", "decode.py", "pages.py", "paged.py"}
"""Files whose public functions take the fields of structs one by one."""
NAMES = {"cu_seqlens_q": "cu_q", "cu_seqlens_k": "cu_k", "k_cache": "keys"}
"""What a field is called by a public verb, where kernels have a shorter word."""


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


def taken_apart(name: str, node: ast.AST) -> list[str]:
    """The structs of which a function takes most fields one by one, if it is no public verb."""
    path, _, function = name.partition(":")
    if not isinstance(node, ast.FunctionDef) or (path in VERBS and function in openmoba.__all__):
        return []
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    taken = {NAMES.get(one.arg, one.arg) for one in every}
    structs = (Blocking, KeyCache, KeyPages)
    return [f"{name}: {of.__name__}" for of in structs if len(taken & set(of._fields)) > MOST_OF_A_STRUCT]


def test_the_arguments_of_an_operation_are_written_once() -> None:
    """Protocols, backends, reference and checks take what belongs together whole; torch's schema is made of it."""
    assert [one for name, node in parsed() for one in taken_apart(name, node)] == []


def test_a_struct_taken_apart_is_found() -> None:
    (function,) = ast.parse("def moba_select(q, *, cu_seqlens_q, cu_seqlens_k, block_size, top_k): ...").body
    assert taken_apart("api.py:moba_select", function) == []
    assert taken_apart("triton/route.py:moba_select", function) == ["triton/route.py:moba_select: Blocking"]


@pytest.mark.parametrize("verb", [api.moba_attention, api.block_attention])
def test_type_checkers_are_told_of_every_option(verb: Callable[..., Any]) -> None:
    """What overloads take as `**options`; mypy sees what is told and not there."""
    taken = {one.name for one in signature(verb).parameters.values() if one.kind is Parameter.KEYWORD_ONLY}
    assert taken - {"block_size", "top_k", "return_lse"} == set(api._Options.__annotations__)


def test_structs_are_small() -> None:
    structs = {
        name: sum(isinstance(field, ast.AnnAssign) for field in node.body)
        for name, node in parsed()
        if isinstance(node, ast.ClassDef) and _is_struct(node)
    }
    assert structs["triton/arguments.py:Call"] == structs["triton/geometry.py:Geometry"] == MOST_FIELDS
    assert structs["arguments.py:KeyPages"] == 6
    assert {name: fields for name, fields in structs.items() if fields > MOST_FIELDS} == {}


def _is_struct(node: ast.ClassDef) -> bool:
    """A NamedTuple, or a dataclass, of the host's too."""
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    return "NamedTuple" in map(ast.unparse, node.bases) or "dataclass" in decorators
