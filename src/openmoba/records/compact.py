"""Numbers of a record in few bytes: six digits, and long lists of them packed."""

from __future__ import annotations

import base64
import bz2
import json
from typing import Any

DIGITS = 6
"""Significant digits of a recorded number: more than any measurement here repeats, and an error below 5e-6 of it."""


def rounded(value: Any) -> Any:
    """Return `value` with every float in it, at any depth of tables and lists, to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(child) for key, child in value.items()}
    return [rounded(child) for child in value] if isinstance(value, list | tuple) else value


def pack(values: list[Any]) -> str:
    """Write a list as the text of its JSON, compressed by bzip2, in base64: half the bytes, every digit the same.

    A shell reads it too: `base64 -d | bunzip2`.
    """
    return base64.b64encode(bz2.compress(json.dumps(values, separators=(",", ":")).encode())).decode()


def unpack(text: Any, where: str) -> list[Any]:
    """Return the list that `pack` wrote.

    Args:
        where: place of `text`, for the error.

    Raises:
        ValueError: `text` is none of `pack`.
    """
    try:
        values = json.loads(bz2.decompress(base64.b64decode(text, validate=True)))
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(
            f"{where} is no packed list but {text!r:.40} ({error}); restore the file, or train the run again if an "
            "older version wrote it"
        ) from None
    if not isinstance(values, list):
        raise ValueError(f"{where} holds a {type(values).__name__}, not a list; restore the file")
    return values
