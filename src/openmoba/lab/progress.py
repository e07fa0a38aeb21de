"""What a long task tells its user: notes, and steps with the time left."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO


class Progress:
    """Silent; the base of all reporters."""

    def note(self, text: str) -> None:
        """Say what is going on, in a sentence."""

    def step(self, done: int, total: int, detail: str = "", share: float | None = None) -> None:
        """Note that `done` of `total` steps are finished; `detail` is a few words, such as the loss.

        Args:
            share: how much of the work that is, where steps differ in it; it makes the time left.
        """


class Percent:
    """Steps of a hundred, of work that goes on in many small ones."""

    def __init__(self, progress: Progress, detail: str) -> None:
        self._progress, self._detail, self._done = progress, detail, -1

    def step(self, share: float) -> None:
        """Note that a share of the work is done, 0 to 1."""
        if int(100 * share) > self._done:
            self._done = int(100 * share)
            self._progress.step(self._done, 100, self._detail)


SECONDS_PER_LINE = 30.0


class TerminalProgress(Progress):
    """A bar that redraws itself on a terminal; elsewhere a line for the first step, the last, and one in 30 seconds.

    A bar is cut at the terminal's width, since a line that wraps cannot be drawn over; the last one is whole.

    The time left is extrapolated from this object's own first step on, so that a resumed run is judged by its
    own speed.
    """

    def __init__(self, label: str = "", stream: TextIO = sys.stderr) -> None:
        self.label, self.stream = label, stream
        self._first: tuple[float, float] | None = None
        self._total = 0
        self._open_line = False
        self._printed = 0.0

    def note(self, text: str) -> None:
        self._end_line()
        print(text, file=self.stream, flush=True)

    def step(self, done: int, total: int, detail: str = "", share: float | None = None) -> None:
        now = time.monotonic()
        share = done / total if share is None else share
        begins = self._first is None or total != self._total or share < self._first[0]
        if begins:
            self._first, self._total = (share, now), total
        line = f"{self.label} {bar(done / total)} {done}/{total}{self._time_left(share, now)}  {detail}"
        if self.stream.isatty():
            shown = line.strip() if done >= total else line.strip()[: _columns(self.stream)]
            print(f"\r\033[K{shown}", end="", file=self.stream, flush=True)
            self._open_line = True
            if done >= total:
                self._end_line()
        elif begins or done >= total or now - self._printed >= SECONDS_PER_LINE:
            self._printed = now
            print(line.strip(), file=self.stream, flush=True)

    def _time_left(self, share: float, now: float) -> str:
        assert self._first is not None
        start, since = self._first
        if share >= 1 or share == start:
            return ""
        return f", {duration((now - since) / (share - start) * (1 - share))} left"

    def _end_line(self) -> None:
        if self._open_line:
            print(file=self.stream, flush=True)
            self._open_line = False


def _columns(terminal: TextIO) -> int | None:
    """Return the width of a terminal; None where it is not known."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or None
    except OSError:
        return None


def bar(share: float, width: int = 24) -> str:
    """Draw a bar of text, `share` of it filled."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "[" + "#" * filled + "." * (width - filled) + "]"


def duration(seconds: float) -> str:
    """Write seconds as a person says them: 42s, 3m10s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
