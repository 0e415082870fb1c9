"""Rows of numbers, one an update, that survive being killed and resumed without a trace."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vipo.errors import VipoError


class TrackingError(VipoError):
    """Records that cannot be continued or written; the message names the file or folder and what to do."""


class Tracker:
    """Appends to ``metrics.jsonl``, ``timing.jsonl`` and ``tb/`` of one run folder.

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
            self._board = _Board(folder / "tb", resume_from + 1)

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
                _write(stream, row)
            self._board.write(update, {**metrics, **timing})
        self._rows += rows[0][1]
        self._last = update

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
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Board:
    """TensorBoard's event file. Its own writers work in a thread, where a full disk is a traceback and no error."""

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        # The viewer reads files in the order of their names.
        self._stream = FileIO(folder / f"events.out.tfevents.{started:.6f}", "ab")
        self._append(Event(wall_time=started, file_version="brain.Event:2"))
        # The viewer drops what an earlier process wrote from this update on.
        self._append(Event(wall_time=started, step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, update: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(wall_time=time.time(), step=update, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._stream.close()

    def _append(self, event: Event) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        _write(self._stream, record.getvalue())


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


def _write(stream: FileIO, row: bytes) -> None:
    # An unbuffered write may take only a part, for instance when the disk fills up.
    while row:
        row = row[stream.write(row) :]
