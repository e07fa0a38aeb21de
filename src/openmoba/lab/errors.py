"""Errors that are handled apart from other bad input."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class DivergenceError(ValueError):
    """A run whose loss or gradient is no number any more: it would be so again, others need not wait for it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send some seconds before they kill."""


@contextmanager
def on_sigterm(act: Callable[[], None] | None = None) -> Iterator[None]:
    """Call `act` at the first SIGTERM in the body of the `with`; without it, and at the second, raise Terminated."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    calls = [act] if act else []

    def handle(*_: Any) -> None:
        if not calls:
            raise Terminated("stopped by SIGTERM")
        calls.pop()()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
