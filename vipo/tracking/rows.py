"""Rows of numbers, one an update, that survive being killed and resumed without a trace."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from vipo.errors import VipoError


class TrackingError(VipoError):
    """Records that cannot be continued or written; the message names the file or folder and what to do."""


class Rows:
    """Appends to ``metrics.jsonl`` and ``timing.jsonl`` of one run folder.

    Rows after `resume_from` are cut off first (they were written after the checkpoint that is resumed, the
    last one perhaps in half), so that the continued ``metrics.jsonl`` has the bytes of an uninterrupted run's.
    Cutting is one truncation: a process killed in it leaves the old file or the cut one.

    Args:
        folder: run folder; created where it is missing.
        resume_from: updates that the resumed checkpoint has done; 0 for a fresh run.

    Raises:
        TrackingError: ``metrics.jsonl`` lacks rows that the checkpoint has seen, or the disk refuses a write.
    """

    def __init__(self, folder: Path, resume_from: int) -> None:
        metrics, timing = folder / "metrics.jsonl", folder / "timing.jsonl"
        last, end = _rows_until(metrics, resume_from)
        if last != resume_from:
            raise TrackingError(
                f"{metrics}: readable up to update {last}, but the checkpoint that is resumed has done {resume_from}; "
                "restore the file, or delete the run folder to start again"
            )
        self._folder = folder
        self._last = resume_from
        with _named_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = _open_cut(metrics, end)
            self._rows = metrics.read_bytes()
            # Times carry no guarantee: what is left of them is kept, what is lost is lost.
            self._timing = _open_cut(timing, _rows_until(timing, resume_from)[1])

    def log(self, update: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Append the row of one finished update to every record.

        Args:
            update: number of updates done, counted from 1, without gaps.
            metrics: deterministic values by name.
            timing: volatile values (seconds, bytes) by name.

        Raises:
            ValueError: `update` is not the next one, a value is not finite, or a value is called ``update``.
            TrackingError: the disk refuses a write.
        """
        if update != self._last + 1:
            raise ValueError(f"update {update} does not follow update {self._last}: rows count from 1 without gaps")
        rows = [(self._metrics, _row(update, metrics)), (self._timing, _row(update, timing))]
        with _named_write_errors(self._folder):
            for stream, row in rows:
                write_whole(stream, row)
        self._rows += rows[0][1]
        self._last = update

    def history(self) -> list[dict[str, float]]:
        """Of each update so far its metrics, and its times where they are not lost, by name."""
        rows = [json.loads(line) for line in self._rows.splitlines()]
        times = (json.loads(line) for line in (self._folder / "timing.jsonl").read_bytes().splitlines())
        by_update = {row["update"]: row for row in times}
        merged = [{**by_update.get(row["update"], {}), **row} for row in rows]
        return [{name: value for name, value in row.items() if name != "update"} for row in merged]

    @property
    def metrics(self) -> str:
        """The text of ``metrics.jsonl``, also where a workflow that took this process for dead deleted the file."""
        return self._rows.decode()

    def flush(self) -> None:
        """Put every row on the disk; called before a checkpoint that counts on them is committed."""
        with _named_write_errors(self._folder):
            os.fsync(self._metrics.fileno())
            os.fsync(self._timing.fileno())
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Flush and close every record."""
        self.flush()
        self._metrics.close()
        self._timing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _named_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrackingError(
            f"{folder}: the run's records cannot be written ({error}); free disk space and start the run again, "
            "it continues from its newest checkpoint"
        ) from error


def _row(update: int, values: Mapping[str, float]) -> bytes:
    row: dict[str, float] = {}
    for name, value in values.items():
        row[name] = float(value)
        if not math.isfinite(row[name]):
            raise ValueError(f"'{name}' is {row[name]} at update {update}: every tracked value must be finite")
    if "update" in row:
        raise ValueError("'update' numbers the row and cannot name a value")
    return (json.dumps({"update": update, **row}, sort_keys=True) + "\n").encode()


def _rows_until(path: Path, update: int) -> tuple[int, int]:
    """The last whole row up to `update`, as its number and the offset of its end in bytes; 0, 0 for none."""
    last = end = 0
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            number = _number(line)
            if number is None or not last < number <= update:
                break
            last, end = number, end + len(line)
    return last, end


def _number(line: bytes) -> int | None:
    # After a power failure the end of a file may be half a row, or zeros.
    if not line.endswith(b"\n"):
        return None
    try:
        number = json.loads(line)["update"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return number if isinstance(number, int) else None


def _open_cut(path: Path, end: int) -> FileIO:
    stream = FileIO(path, "ab")
    stream.truncate(end)
    return stream


def write_whole(stream: FileIO, row: bytes) -> None:
    """Write all of `row` to an unbuffered stream."""
    # An unbuffered write may take only a part, for instance when the disk fills up.
    while row:
        row = row[stream.write(row) :]
