"""TensorBoard's event files, ``tb/`` of a run folder: ``tensorboard --logdir results/<experiment>/runs``."""

import time
from collections.abc import Iterable
from io import BytesIO, FileIO

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vipo.tracking.rows import write_whole
from vipo.tracking.tracker import Row, TrackedRun


class TensorBoard:
    """Writes by itself: TensorBoard's own writers work in a thread, where a full disk is a traceback and no error."""

    def __init__(self, run: TrackedRun) -> None:
        known = run.folder.is_dir() and any(run.folder.iterdir())
        run.folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        # The viewer reads files in the order of their names.
        self._stream = FileIO(run.folder / f"events.out.tfevents.{started:.6f}", "ab")
        self._append(Event(wall_time=started, file_version="brain.Event:2"))
        for row in () if known else run.history:
            self.log(row)
        # The viewer drops what an earlier process wrote from this update on.
        first = len(run.history) + 1
        self._append(Event(wall_time=started, step=first, session_log=SessionLog(status=SessionLog.START)))

    def log(self, row: Row) -> None:
        """One event of all values and pictures."""
        scalars = (Summary.Value(tag=name, simple_value=value) for name, value in row.values.items())
        values = [*scalars, *_pictures(row)]
        self._append(Event(wall_time=time.time(), step=row.update, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _append(self, event: Event) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        write_whole(self._stream, record.getvalue())


def _pictures(row: Row) -> Iterable[Summary.Value]:
    for name, path in row.pictures.items():
        with Image.open(path) as picture:
            width, height = picture.size
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        yield Summary.Value(tag=name, image=encoded)
