"""Waits for what another process does: each says what it waited for, and none outlasts what it waits on."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SECONDS = 3600
"""Of every wait its own limit, against hangs: no measure, and far beyond what the slowest machine takes."""


def eventually(told: str, holds: Callable[[], object], died: Callable[[], str | None] = lambda: None) -> None:
    """Wait until something holds.

    Args:
        told: what is waited for.
        holds: looked at again and again.
        died: what there is to say where it cannot come any more; None while it can.
    """
    end = time.monotonic() + SECONDS
    while not holds():
        last = died()
        # It may have come just before the end.
        if last is not None and not holds():
            raise AssertionError(f"not before the end of what should have done it: {told}\n{last}")
        assert time.monotonic() < end, f"not within {SECONDS} s: {told}"
        time.sleep(0.02)


def ended(process: subprocess.Popen[bytes] | subprocess.Popen[str], said: Path) -> Callable[[], str | None]:
    """For `died`: the exit status of a process that has ended, and the file that holds what it said."""

    def told() -> str | None:
        return None if process.poll() is None else f"ended with status {process.returncode}: {said.read_text()}"

    return told


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; nobody may be there to reap what has lost its parent."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
