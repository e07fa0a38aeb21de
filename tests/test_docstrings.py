"""Docstrings of functions open with a verb, as who scans a file expects; phases of long kernels say why.

"Return the ...", not "The ...".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for folder in ("src", "docs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
VERBS = re.compile(
    r"""
    Add|Align|Allocate|Append|Assert|Attend|Average|Begin|Bring|Build|Call|Capture|Cast|Check|Choose|Compare|Compile
    |Complete|Compute|Convert|Convolve|Count|Cut|Declare|Decode|Decompress|Decorate|Delete|Describe|Do|Draw|Drop
    |Enter|Estimate|Evaluate|Fill|Find|Fit|Fold|Forget|Gather|Generate|Give|Go|Group|Hash|Have|Hold|Import|Install
    |Invert|Keep|Launch|Lay|Let|List|Load|Lock|Make|Measure|Merge|Move|Multiply|Name|Note|Number|Open|Order|Pick
    |Place|Plan|Predict|Prefer|Prepare|Print|Put|Raise|Rank|Read|Refuse|Remember|Remove|Repeat|Replace|Replay
    |Resolve|Return|Run|Save|Say|Score|Search|See|Serve|Set|Share|Shorten|Show|Sort|Stack|Start|Stop|Store|Stream|Sum|Take|Tell
    |Tile|Time|Tokenise|Train|Turn|Use|View|Wait|Work|Write|Yield
    """,
    re.VERBOSE,
)
"""What functions here do. A new verb is added here; articles, nouns and question words are none."""

NOUN = re.compile(r"(?!Return|Say|Tell)\w+ of\b")
"""A word that is a verb too, and is none here: "Number of", "Sum of"."""


def openings(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and first word of the docstring of every function of a file; properties may be noun phrases."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            words, decorators = (ast.get_docstring(node) or "").split(), map(ast.unparse, node.decorator_list)
            if words and not any("property" in decorator for decorator in decorators):
                yield node.name, "a noun" if NOUN.match(" ".join(words)) else words[0].rstrip(",.:;")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb(path: Path) -> None:
    found = [f"{name}: {word}" for name, word in openings(path.read_text()) if not VERBS.fullmatch(word)]
    assert found == []


def test_other_openings_are_found() -> None:
    text = (
        'def f():\n    """The sum."""\ndef g():\n    """`x`, twice."""\ndef h():\n    """Write, and say so."""\n'
        'def n():\n    """Number of things."""\n'
        'class C:\n    @property\n    def p(self):\n        """Its name."""\n'
        '    def m(self):\n        """Whether it is."""\n'
    )
    assert [name for name, word in openings(text) if not VERBS.fullmatch(word)] == ["f", "g", "n", "m"]


KERNELS = sorted((ROOT / "src/openmoba/ops/triton").rglob("*.py"))
LONG, UNEXPLAINED = 20, 18
"""Statements from which on a kernel is long, and the most of them in a row without a comment."""


def unexplained(text: str) -> Iterator[tuple[str, int]]:
    """Yield name and longest run of statements without a comment, of every long kernel of a file."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(of) for of in node.decorator_list):
            inside = [one for one in ast.walk(node) if isinstance(one, ast.stmt) and one is not node]
            statements = sorted({one.lineno for one in inside if not _is_text(one)})
            run = longest = 0
            for before, at in pairwise([statements[0], *statements]):
                run = 1 if any(_is_comment(line) for line in lines[before:at]) else run + 1
                longest = max(longest, run)
            if len(statements) >= LONG:
                yield node.name, longest


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_comment(line: str) -> bool:
    return "# " in line and "# fmt:" not in line and "# noqa" not in line


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_long_kernels_say_why(path: Path) -> None:
    assert [(name, run) for name, run in unexplained(path.read_text()) if run > UNEXPLAINED] == []


def test_unexplained_statements_are_counted() -> None:
    plain = "@jit\ndef f(x):\n    " + "x += 1\n    " * 24
    assert list(unexplained(plain)) == [("f", 24)]
    assert list(unexplained(plain.replace("x += 1\n    " * 12, "x += 1\n    " * 12 + "# Why.\n    ", 1))) == [("f", 12)]
    assert list(unexplained(plain.replace("@jit\n", ""))) == []
    assert sum(len(list(unexplained(path.read_text()))) for path in KERNELS) > 10
