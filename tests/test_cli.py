"""The command `openmoba` itself: what it imports to answer, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from openmoba import cli
from openmoba.lab.errors import Terminated, on_sigterm

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

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has those in its background ignore it

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
        *(([*name.split(), "--help"], 0) for name in cli.commands()),
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


@pytest.mark.parametrize("no_color", ["", "1"])
def test_help_on_a_terminal_has_colours_unless_nobody_wants_them(no_color: str) -> None:
    terminal, end = os.openpty()
    environment = os.environ | {"NO_COLOR": no_color, "TERM": "xterm"}
    command = [sys.executable, "-m", "openmoba", "plot", "--help"]
    with subprocess.Popen(command, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        said = b""
        try:
            while found := os.read(terminal, 4096):
                said += found
        except OSError:  # as Linux says the end of a terminal
            pass
        os.close(terminal)
    assert process.returncode == 0
    assert b"usage:" in said
    assert (b"\x1b[" in said) == (not no_color)


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


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert out.startswith(f"openmoba {project['version']}, python ")
    assert f"torch {torch.__version__.partition('+')[0]}" in out


def test_sigterm_stops_what_does_not_handle_it(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmoba.lab.study.commands.Plot.run", stop)
        assert cli.main(["plot", "anything"]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_whoever_interrupts_is_told_that_it_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openmoba.lab.study.commands.Plot.run", stop)
    assert cli.main(["plot", "anything"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_whoever_asks_twice_does_not_wait_for_the_end_of_the_step() -> None:
    asked: list[str] = []

    def ask_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert asked == ["once"]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with on_sigterm(lambda: asked.append("once")), pytest.raises(Terminated):
        ask_twice()


def test_a_fault_of_the_program_is_a_traceback_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*_: Any) -> None:
        raise KeyError("kind")

    monkeypatch.setattr("openmoba.lab.study.commands.Plot.run", fault)
    assert cli.main(["plot", "anything"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "error: this is a fault of openmoba, please report it" in error


def test_output_that_nobody_reads_any_more_ends_the_command() -> None:
    code = (
        "import sys; from openmoba import cli; from openmoba.lab.study.commands import Plot\n"
        "Plot.run = lambda self: print('x' * 10**6)\nsys.exit(cli.main(['plot', 'x']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr.read() == b""
