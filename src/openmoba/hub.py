"""Names that may be a folder's or the hub's: what can only be a path is not looked for on the hub, for minutes."""

from __future__ import annotations

import re
from pathlib import Path

A_MODEL = "a model's folder, or OWNER/NAME on the hub"


def check_model_source(source: str | Path, what: str) -> None:
    """Raise ValueError as `check_source` does, and at once where the hub does not answer and nothing of it is kept.

    Those who read from the hub try each file again for half a minute then.
    """
    check_source(source, what)
    if Path(source).expanduser().exists():
        return
    from huggingface_hub import constants, get_session  # what needs torch alone looks for no model

    kept = Path(constants.HF_HUB_CACHE) / f"models--{str(source).replace('/', '--')}"
    if constants.HF_HUB_OFFLINE or kept.exists():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # those of the connection have no common base
        raise ValueError(f"{source} does not exist here, and the hub does not answer ({error}); give {what}") from error


def check_source(source: str | Path, what: str = A_MODEL) -> None:
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
