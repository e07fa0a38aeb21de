"""The documentation runs: snippets and cheap commands are executed, expensive commands are parsed.

Each document is one session from top to bottom, in a folder that holds stand-ins for what its commands name: a tiny
random model in the place of the pretrained one, and a text.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers")

import tyro
from decoders import save_model
from transformers import Qwen3Config

from openmoba.cli import commands as subcommands
from openmoba.cli import main
from openmoba.lab.study.recipe import read_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
EXECUTED = ("convert", "generate")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the document it begins in."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text()
    return [Block(found[1], found[2], text[: found.start()].count("\n") + 2) for found in FENCE.finditer(text)]


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a shell block, as lists of words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen3 under the real one's name, and `book.txt`."""
    folder = tmp_path_factory.mktemp("documents")
    save_model(folder / "Qwen" / "Qwen3-0.6B", Qwen3Config, num_hidden_layers=4, max_position_embeddings=4096)
    (folder / "book.txt").write_text("It was a bright cold day in April. " * 60)
    return folder


# Of torch's data loader, to whoever leaves pin_memory at transformers' default on a machine without a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_runs(document: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Qwen", "book.txt"):
        (tmp_path / name).symlink_to(stand_in / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": document.stem}
    for block in blocks(document):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
            exec(code, names)
        elif block.language == "sh":
            for words in commands(block):
                run_command(words)


def run_command(words: list[str]) -> None:
    """Run a command of the documentation if it is cheap; else check that it could run."""
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert what == "." or what.removeprefix(".[").removesuffix("]") in extras
        case ["vllm", "serve", model]:
            assert "moba" in json.loads((Path(model) / "config.json").read_text()), model
        case ["python", script, *_]:
            compile((ROOT / script).read_text(), script, "exec")
        case ["openmoba", command, source, *_] if command in EXECUTED and Path(source).exists():
            assert main(words[1:]) == 0, words
        case ["openmoba", *arguments] | ["torchrun", "--nproc-per-node", _, "-m", "openmoba", *arguments]:
            parse(arguments)
        case _:
            pytest.fail(f"no rule how to check {words}")


def parse(arguments: list[str]) -> Any:
    """Read a command's options without running it; recipes that it names, and runs of the demo, are there."""
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in subcommands() else arguments[0]
    for path in arguments:
        assert not path.startswith("recipes/") or (ROOT / path).exists(), path
        if path.startswith("runs/demo/"):
            demo = read_recipe(ROOT / "recipes" / "demo.toml")
            assert path.removeprefix("runs/demo/") in {run.name for run in demo.runs}, path
    return tyro.cli(subcommands()[name][0], args=arguments[len(name.split()) :])


def test_checks_can_fail() -> None:
    for line in (
        "make coffee",
        "pip install '.[all]'",
        "openmoba studies recipes/demo.toml",
        "openmoba study recipes/none.toml",
        "openmoba evaluate runs/demo/pretrain/giant-moba-seed0",
        "vllm serve runs/nothing",
    ):
        with pytest.raises((AssertionError, KeyError, FileNotFoundError)):
            run_command(shlex.split(line))
    with pytest.raises(SystemExit):
        run_command(["openmoba", "train", "runs/x", "--arm.nome", "moba"])


def test_readme_shows_the_three_ways_and_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert ["make", "demo"] in shell("README.md")
    assert ["make", "test"] in shell("README.md")
    assert all(name in text for name in ("moba_attention(", "configure(model", "openmoba study"))
    documents = ("README.md", "docs/laboratory.md", "docs/models.md", "docs/parallel.md")
    lines = [" ".join(words) for name in documents for words in shell(name)]
    shown = {line.partition(" -m openmoba " if line.startswith("torchrun") else "openmoba ")[2] for line in lines}
    assert all(any(line.startswith(name) for line in shown) for name in subcommands())


def shell(name: str) -> list[list[str]]:
    """The commands that a document shows."""
    return [words for block in blocks(ROOT / name) if block.language == "sh" for words in commands(block)]


@pytest.mark.parametrize("name", ["README.md", "docs/laboratory.md"])
def test_commands_run_on_a_cpu_unless_they_say_so_and_write_where_git_does_not_look(name: str) -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/")}
    before, written = "", []
    for block in blocks(ROOT / name):
        before = "\n".join((ROOT / name).read_text().splitlines()[: block.line - 2]).rstrip().splitlines()[-1]
        for words in commands(block) if block.language == "sh" else ():
            if words[0] == "openmoba":
                assert (words[1:3] in (["bench", "decode"], ["bench", "paged"])) == ("on a GPU" in before), words
                options = parse(words[1:])
                written += [getattr(options, name) for name in ("out", "folder") if getattr(options, name, None)]
    assert written
    assert {path.parts[0] for path in written} <= ignored, written
