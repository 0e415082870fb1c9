"""Figures of a step, on disk as soon as they are known: whatever ends it, they stay."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Record:
    """Appends one JSON line a figure: ``{"key": ..., "value": ...}``.

    Args:
        path: file of the step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, key: str, value: Any) -> None:
        """Note a figure, and show it."""
        print(f"  {key}: {value}", flush=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "value": value}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def others_go_on(record: Record, name: str, failed: list[str]) -> Iterator[None]:
    """Around one of several things that a step measures: its failure is noted and added to `failed`, for the others are
    still worth their time."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record.put(f"{name}.failed", f"{type(error).__name__}: {error}"[:500])
        failed.append(name)


def read_figures(path: Path) -> dict[str, Any]:
    """All figures that a step noted, also one that was killed in the middle of a line."""
    figures = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        figures[row["key"]] = row["value"]
    return figures
