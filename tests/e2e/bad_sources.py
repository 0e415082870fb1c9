"""Prompt sources that misbehave, by import path."""

import sys
from collections.abc import Iterator
from pathlib import Path


def exits(root: Path) -> Iterator[dict[str, str]]:
    yield {"prompt": "a circle"}
    sys.exit(0)


def forges(root: Path) -> list[dict[str, str]]:
    raise RuntimeError("gone\nerror: forged\n\x1b[2Jverdict: reproducible " + "x" * 5000)
