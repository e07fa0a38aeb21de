"""Names that may be a folder's or the hub's: what can only be a path is not looked for on the hub, for minutes."""

from __future__ import annotations

import re
from pathlib import Path


def check_source(source: str | Path, what: str = "a model's folder, or OWNER/NAME on the hub") -> None:
    """Raise ValueError if there is nothing at `source`, and it is no name that the hub can have.

    A name whose first part is a folder here, such as runs/demo beside runs/, is taken for a path.
    """
    text = str(source)
    if text and Path(text).expanduser().exists():
        return
    first = Path(text).parts[0] if Path(text).parts else ""
    of_the_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".")
    if not of_the_hub or (first != text and Path(first).exists()):
        raise ValueError(f"{text or 'an empty name'} does not exist; give {what}")
