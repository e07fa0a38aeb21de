"""The command `openmoba`: one dataclass per subcommand, its fields the options, its `run` the work.

A module with such a dataclass imports nothing slow: help and bad options are answered without torch.

A command on the folder of a run has `as_stored`: itself with the run's settings, which are what options default to.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from openmoba.errors import explain
from openmoba.lab.errors import Terminated, on_sigterm


class Command(Protocol):
    """What a subcommand does; its fields are the options."""

    def run(self) -> None:
        """Do it."""


def commands() -> dict[str, tuple[type[Command], str]]:
    """Return subcommand -> (its dataclass, what it does); imported here, as `openmoba --version` needs no library."""
    from openmoba.bench.commands import Attention, Decode, Paged
    from openmoba.bench.parallel.command import Parallel
    from openmoba.bench.plot import Plot as PlotBench
    from openmoba.bench.training.command import Training
    from openmoba.lab.data.commands import MakeCorpus
    from openmoba.lab.measure.commands import Evaluate, Generate, Needle
    from openmoba.lab.model.commands import Convert
    from openmoba.lab.study.commands import Fit, Plot, Study
    from openmoba.lab.train.commands import Train
    from openmoba.lab.train.runs import Runs

    return {
        "corpus": (MakeCorpus, "say what documents a source holds, write them as Parquet"),
        "train": (Train, "train one model, or go on with it"),
        "evaluate": (Evaluate, "LM, position-wise and trailing loss of a run or a model"),
        "runs": (Runs, "list runs and compare them: state, losses, speed"),
        "study": (Study, "train a recipe's runs, draw its charts, write its report"),
        "fit": (Fit, "power laws of a study's runs, with intervals"),
        "plot": (Plot, "draw a study's charts again, by any convention of compute"),
        "evaluate needle": (Needle, "needle in a haystack: depth-by-length heat map"),
        "generate": (Generate, "continue a text with a run's or a model's weights"),
        "convert": (Convert, "make a MoBA checkpoint of a Llama, Qwen, Mistral ... one"),
        "bench attention": (Attention, "time MoBA against dense attention and sparse peers"),
        "bench decode": (Decode, "time decoding over a cache, and prefill in chunks"),
        "bench paged": (Paged, "time a cache in pages beside a contiguous one"),
        "bench parallel": (Parallel, "time one sequence over several devices, under torchrun"),
        "bench training": (Training, "time training steps by size, attention and length"),
        "bench plot": (PlotBench, "figures and table of a benchmark"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code.

    0 when it is done; 2 after bad input, or where the machine does not have what it takes; 1 after a fault of the
    program, with a traceback; as shells say it 130 after Ctrl-C, 143 after SIGTERM, 141 when its output was cut off.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with on_sigterm():
            return _run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from openmoba.records.provenance import versions

        print(", ".join(f"{package} {version}" for package, version in versions().items()))
        return 0
    if os.environ.get("NO_COLOR"):  # no-color.org; tyro has a variable of its own, and reads it when it is imported
        os.environ["PYTHON_TYRO_ANSI_CODES"] = "False"
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(known))
        return 0 if arguments else 2
    words = 2 if " ".join(arguments[:2]) in known else 1
    name = " ".join(arguments[:words])
    if name not in known:
        print(f"error: unknown command {name!r}\n\n{_usage(known)}", file=sys.stderr)
        return 2
    import tyro

    parse = partial(tyro.cli, known[name][0], args=arguments[words:], prog=f"openmoba {name}")
    options: Any = parse()
    if hasattr(options, "as_stored"):
        options = parse(default=options.as_stored())
    options.run()
    return 0


def _report(error: BaseException) -> int:
    """Say on standard error what went wrong; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{str(error) or 'stopped'}", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    if isinstance(error, BrokenPipeError):  # whoever read standard output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    assert isinstance(error, Exception)
    said = explain(error)
    if said is not None:
        print(f"error: {said}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(
        "error: this is a fault of openmoba, please report it with the lines above and the command; what was recorded "
        "before is safe",
        file=sys.stderr,
    )
    return 1


def _usage(known: dict[str, tuple[type[Command], str]]) -> str:
    lines = "\n".join(f"  {name:<16} {text}" for name, (_, text) in known.items())
    end = "openmoba COMMAND --help lists the options; openmoba --version."
    return f"usage: openmoba COMMAND [OPTIONS]\n\n{lines}\n\n{end}"


if __name__ == "__main__":
    sys.exit(main())
