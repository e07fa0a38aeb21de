"""Docstrings of functions open with a verb, as who scans a file expects: "Return the ...", not "The ..."."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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
    |Resolve|Return|Run|Say|Score|Search|See|Set|Share|Shorten|Show|Sort|Stack|Start|Stop|Store|Stream|Sum|Take|Tell
    |Tile|Time|Tokenise|Train|Turn|Use|View|Wait|Work|Write|Yield
    """,
    re.VERBOSE,
)
"""What functions here do. A new verb is added here; articles, nouns and question words are none."""


def openings(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and first word of the docstring of every function of a file; properties may be noun phrases."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            words, decorators = (ast.get_docstring(node) or "").split(), map(ast.unparse, node.decorator_list)
            if words and not any("property" in decorator for decorator in decorators):
                yield node.name, words[0].rstrip(",.:;")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb(path: Path) -> None:
    found = [f"{name}: {word}" for name, word in openings(path.read_text()) if not VERBS.fullmatch(word)]
    assert found == []


def test_other_openings_are_found() -> None:
    text = (
        'def f():\n    """The sum."""\ndef g():\n    """`x`, twice."""\ndef h():\n    """Write, and say so."""\n'
        'class C:\n    @property\n    def p(self):\n        """Its name."""\n'
        '    def m(self):\n        """Whether it is."""\n'
    )
    assert [name for name, word in openings(text) if not VERBS.fullmatch(word)] == ["f", "g", "m"]
