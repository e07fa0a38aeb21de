"""The sharding that models compute under: nothing hands it to an attention function.

It is the process's and not a context variable's, since checkpointed layers are computed again by autograd's threads,
which see no context of the thread that called them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from openmoba.parallel.sharding import Sharding

_current: Sharding | None = None


def current_sharding() -> Sharding | None:
    """Return the sharding in force, None for whole sequences."""
    return _current


@contextmanager
def sharded(sharding: Sharding) -> Iterator[None]:
    """Put a sharding in force: for the forward pass of a model, and the backward pass after it."""
    global _current
    before, _current = _current, sharding
    try:
        yield
    finally:
        _current = before
