"""The command `openmoba` itself: what it imports to answer, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("tyro")

from openmoba.cli import commands

ANSWERS = """
import sys
from openmoba.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
slow = {"torch", "triton", "transformers", "datasets", "matplotlib", "numpy"} & set(sys.modules)
print(code or 0, *sorted(slow))
"""

INTERRUPTED = """
import os, signal, sys
from openmoba.cli import main

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.exit(main(["generate", "model", "--prompt", "Once"]))
"""


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        *(([*name.split(), "--help"], 0) for name in commands()),
        (["--help"], 0),
        (["--version"], 0),
        (["training"], 2),
        (["train", "run", "--train.step", "3"], 2),
        (["generate", "model", "--temperature", "-1"], 2),
        (["bench", "decode", "--chunk", "0"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_what_is_wrong_with_arguments_are_said_without_torch(arguments: list[str], code: int) -> None:
    done = python(ANSWERS, *arguments)
    assert done.stdout.splitlines()[-1] == str(code), done.stderr


def test_whoever_interrupts_while_modules_load_sees_no_traceback() -> None:
    done = python(INTERRUPTED)
    assert done.returncode in (130, -2)  # as a shell says both
    assert done.stderr == "\nstopped\n"


def test_names_of_the_package_are_there_before_they_are_imported() -> None:
    done = python(
        "import sys, openmoba; assert set(openmoba.__all__) <= set(dir(openmoba)); assert 'torch' not in sys.modules\n"
        "from openmoba import *; print(all(name in globals() for name in openmoba.__all__))\n"
        "openmoba.nothing"
    )
    assert done.stdout == "True\n"
    assert done.stderr.endswith("AttributeError: module 'openmoba' has no attribute 'nothing'\n")
