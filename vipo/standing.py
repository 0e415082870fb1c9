"""How far a stage is, and what stopped it, as its log tells."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

# What is wider than the log is cut off at the end.
_BAR = re.compile(r"(\d+)/(\d+) \[[\d:]+<([\d:?]+)[^\]\n]*")
_REWARD = re.compile(r"reward=([^,\]]+)")


@dataclass(frozen=True)
class Standing:
    """How far a stage is, as its newest progress bar tells: `done` of `total`, time left, reward from -> to (or "")."""

    done: int
    total: int
    left: str
    reward: str

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.done / self.total if self.total else 0.0


def read_standing(log: Path) -> Standing | None:
    """From the newest progress bar in the last 16 KiB of a stage's log; None where there is none."""
    found = list(_BAR.finditer(_tail(log)))
    if not found:
        return None
    reward = _REWARD.search(found[-1][0])
    return Standing(int(found[-1][1]), int(found[-1][2]), found[-1][3], reward[1].strip() if reward else "")


def read_error(log: Path) -> str:
    """A stage's error as its log tells it: from the last ``error: `` on, or its last lines; "" if it is empty."""
    lines = [line for line in _tail(log).splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-15:])


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # Of others: it must not steer the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\r", "\n"))
