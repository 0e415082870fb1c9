"""Progress bars that a person can follow on a terminal and read in a log."""

import contextlib
import sys
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """A stream on which a bar's redraws become lines: logs have no carriage returns."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.replace("\r", "").strip()
        # A reader that was killed with the job must not keep the run from writing its checkpoint.
        with contextlib.suppress(BrokenPipeError):
            return self._stream.write(f"{line}\n") if line else 0
        return 0

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()


def progress_bar(*, total: int, description: str, unit: str, done: int = 0, disable: bool = False) -> "tqdm[Any]":
    """A bar on standard error: redrawn in place on a terminal, one line every ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        disable=disable,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else 10.0,
        ncols=None if terminal else 120,
        dynamic_ncols=terminal,
    )
