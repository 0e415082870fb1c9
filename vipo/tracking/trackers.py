"""The trackers of a run, behind the boundary around code that is not vipo's."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vipo.config.registries import TRACKERS
from vipo.config.run import Config
from vipo.errors import Interrupted, Preempted
from vipo.foreign import foreign, is_import_path, resolve
from vipo.tracking.rows import TrackingError
from vipo.tracking.tracker import Row, TrackedRun, Tracker

log = logging.getLogger(__name__)


def check_tracker(name: str) -> None:
    """Find out before anything is computed whether a tracker is there; nothing is imported for one that ships.

    Raises:
        TrackingError: the package of one that ships is not installed, or an import path names nothing callable.
    """
    if is_import_path(name):
        if not callable(resolve(name, TrackingError, _called(name))):
            raise TrackingError(f"{_called(name)}: is nothing that can be called with a TrackedRun")
        return
    # A folder of that name in the working directory is a package without an origin.
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise TrackingError(
            f"{_called(name)}: its package is not installed: uv pip install 'vipo[{name}]' (without uv: pip "
            "install), or leave it out of tracking.trackers"
        )


def sheet_path(folder: Path, update: int) -> Path:
    """Where a run folder keeps an update's sheet of samples."""
    return folder / "sheets" / f"{update:06d}.png"


def row_of(folder: Path, update: int, values: Mapping[str, float]) -> Row:
    """What is told of an update, with its sheet where there is one."""
    sheet = sheet_path(folder, update)
    return Row(update, values, {"samples": sheet} if sheet.is_file() else {})


class Trackers:
    """The trackers that a configuration names. One that fails is told of once and left out; the run goes on.

    Whatever they change in the process is put back (`vipo.foreign`).

    Args:
        config: of the run.
        folder: run folder. Trackers write into ``trackers/<name>`` there, TensorBoard into ``tb``.
        history: of each update that the resumed checkpoint has done, its values.
    """

    def __init__(self, config: Config, folder: Path, history: Sequence[Mapping[str, float]]) -> None:
        self._folder = folder
        self._open: dict[str, Tracker] = {}
        rows = [row_of(folder, update, values) for update, values in enumerate(history, 1)]
        data = config.model_dump(mode="json")
        for name in config.tracking.trackers:
            place = folder / "tb" if name == "tensorboard" else folder / "trackers" / name.replace(":", ".")
            with self._failing_alone(name):
                maker = resolve(_path(name), TrackingError, _called(name))
                with foreign(TrackingError, _called(name), _path(name)):
                    self._open[name] = _checked(
                        maker(TrackedRun(config.experiment.name, config.run_name, data, place, rows))
                    )

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """Show one finished update everywhere.

        Args:
            update: its number, from 1.
            values: metrics and volatile values by name, all finite.
        """
        row = row_of(self._folder, update, values)
        for name, tracker in list(self._open.items()):
            with self._failing_alone(name), foreign(TrackingError, _called(name), _path(name)):
                tracker.log(row)

    def close(self) -> None:
        """Close every tracker."""
        for name, tracker in list(self._open.items()):
            with self._failing_alone(name), foreign(TrackingError, _called(name), _path(name)):
                tracker.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            stopped = issubclass(kind, Preempted | Interrupted | KeyboardInterrupt)
            for name, tracker in list(self._open.items()):
                with self._failing_alone(name), foreign(TrackingError, _called(name), _path(name)):
                    if callable(tell := getattr(tracker, "ended_early", None)):
                        tell(stopped)
        self.close()

    @contextmanager
    def _failing_alone(self, name: str) -> Iterator[None]:
        try:
            yield
        except TrackingError as error:
            self._open.pop(name, None)
            log.warning("%s; the run goes on without it", error)


def _checked(made: Any) -> Tracker:
    for method in ("log", "close"):
        if not callable(getattr(made, method, None)):
            raise TrackingError(f"gives {type(made).__name__}, which has no method {method!r}")
    return made


def _path(name: str) -> str:
    return TRACKERS.get(name, name)


def _called(name: str) -> str:
    return f"tracker {name!r}"
