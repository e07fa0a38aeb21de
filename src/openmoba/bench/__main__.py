"""`python -m openmoba.bench [attention | decode | paged | parallel | training]`: without the package installed.

Attention and decoding need torch alone, training what the laboratory needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args, get_origin, get_type_hints

from openmoba.bench.commands import Attention, Decode, Paged
from openmoba.bench.parallel.command import Parallel
from openmoba.bench.training.command import Training

BENCHMARKS: dict[str, type[Attention | Decode | Paged | Parallel | Training]] = {
    "attention": Attention,
    "decode": Decode,
    "paged": Paged,
    "parallel": Parallel,
    "training": Training,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the fields of the benchmark named first (`attention` if none is) as options, and run it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments.pop(0) if arguments and arguments[0] in BENCHMARKS else "attention"
    benchmark = BENCHMARKS[name]
    parser = argparse.ArgumentParser(f"python -m openmoba.bench {name}", description=benchmark.__doc__)
    kinds = get_type_hints(benchmark)
    for option in fields(benchmark):
        kind = kinds[option.name]
        several = get_origin(kind) is tuple
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            default=option.default,
            type=(get_args(kind) or (kind,))[0],  # of `float | None` and `tuple[str, ...]`, the first
            nargs="+" if several else None,
        )
    try:
        benchmark(**vars(parser.parse_args(arguments))).run()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
