"""The interface of a tracker: what shows a run to people while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol


@dataclass(frozen=True)
class Row:
    """What is told of one finished update.

    Attributes:
        update: its number, from 1.
        values: metrics, and volatile values (seconds, bytes), by name; all finite.
        pictures: PNG files by name, of some updates only; they stay where they are.
    """

    update: int
    values: Mapping[str, float]
    pictures: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        experiment: name of the experiment.
        name: ``<arm>-s<seed>``.
        config: the resolved configuration, as plain data.
        folder: where the tracker writes, and nowhere else; it need not be there, and may hold what an earlier process
            of the run wrote.
        history: what the run goes on from: every update up to the checkpoint that is resumed, none of a fresh run.
    """

    experiment: str
    name: str
    config: Mapping[str, Any]
    folder: Path
    history: Sequence[Row]


class Tracker(Protocol):
    """What a tracker's class, or whatever is called with a `TrackedRun`, gives.

    Once made, it shows the rows of `TrackedRun.history` and no others: a process that was killed may have told of
    updates that the resumed one makes again. What it raises is told once; then the run goes on without it.

    One that has a method ``ended_early(stopped: bool)`` is told, before it is closed, that the run failed or, with
    ``stopped``, was asked to stop and may go on.
    """

    def log(self, row: Row) -> None:
        """Show one update; they come in order, without gaps."""

    def close(self) -> None:
        """No update follows."""
