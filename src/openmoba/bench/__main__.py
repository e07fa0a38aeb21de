"""`python -m openmoba.bench`: `openmoba bench attention` on a machine that has torch and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args, get_origin, get_type_hints

from openmoba.bench.attention import Attention


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the fields of `Attention` as options, and run it."""
    parser = argparse.ArgumentParser("python -m openmoba.bench", description=Attention.__doc__)
    kinds = get_type_hints(Attention)
    for option in fields(Attention):
        kind = kinds[option.name]
        several = get_origin(kind) is tuple
        parser.add_argument(
            f"--{option.name}",
            default=option.default,
            type=(get_args(kind) or (kind,))[0],  # of `float | None` and `tuple[str, ...]`, the first
            nargs="+" if several else None,
        )
    try:
        Attention(**vars(parser.parse_args(arguments))).run()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
