"""Progress of long loops: a bar on a terminal, or lines in a log.

A loop shows `ProgressBar(..., disable=quiet)`. A command whose output goes to a log runs inside `progress_lines()`:
disabled bars then write lines instead, the first one after ten seconds, further ones every ten seconds and, in loops
that last long, once a minute:

    progress: pretrain: 38 %, epoch 15, loss 0.0312, validation 98.60%; about 12 min left
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

PREFIX = "progress: "
# Seconds between two lines at first, and at most.
FIRST, MOST = 10.0, 60.0

_logging = False


@contextlib.contextmanager
def progress_lines(on: bool = True) -> Iterator[None]:
    """Context in which disabled bars write lines to standard error."""
    global _logging
    before, _logging = _logging, on
    try:
        yield
    finally:
        _logging = before


class ProgressBar(tqdm):
    """`tqdm.tqdm`; inside `progress_lines`, a disabled bar writes lines."""

    def __init__(self, *args: Any, disable: bool | None = False, **options: Any):
        self._lines = bool(disable) and _logging
        if self._lines:
            # miniters: the clock is read in every step, as tqdm's estimate of the steps between two lines may be wrong.
            options |= {"mininterval": FIRST, "miniters": 1, "delay": FIRST, "leave": False, "file": sys.stderr}
            disable = False
        super().__init__(*args, disable=disable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Show the bar, or write a line."""
        if not self._lines:
            return super().display(msg, pos)
        if msg is None and self.n > self.initial:
            print(PREFIX + self._line(), file=sys.stderr, flush=True)
            self.mininterval = min(MOST, max(FIRST, self.format_dict["elapsed"] / 20))
        return False

    def _line(self) -> str:
        done = f"{100 * self.n / self.total:.0f} %" if self.total else f"{self.n} {self.unit}s"
        line = ", ".join(filter(None, (done, self.postfix)))
        fresh = self.n - self.initial
        if not self.total or fresh <= 0:
            return f"{self.desc}: {line}"
        left = self.format_dict["elapsed"] / fresh * (self.total - self.n)
        return f"{self.desc}: {line}; about {duration(left)} left"


def duration(seconds: float) -> str:
    """A time in words, e.g. 12 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
