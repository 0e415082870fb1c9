"""Steps as processes of their own, each with its time limit; what one noted stays, however it ends."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import read_figures
from benchmarks.gpu.steps import Step, figures_file

UNDER_WAY = "under way"
"""Status of a step that has not ended."""
_POLL, _EVERY = 0.05, 5.0


class Running:
    """A step that was started.

    Args:
        step: which.
        command: that does its work.
        folder: of the steps' figures; its log is written there.
        seconds: after which it is ended.
    """

    def __init__(self, step: Step, command: Sequence[str], folder: Path, seconds: float) -> None:
        self.step, self._folder, self._seconds = step, folder, seconds
        self._log = folder / f"{step.name}.log"
        self._start, self._told = time.monotonic(), ""
        # Beside others a thread each, or they would wait for each other's.
        env = os.environ | ({} if step.timed else {"OMP_NUM_THREADS": "1"})
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=env
            )

    def ended(self) -> bool:
        """Whether it is over; ends it where its time is."""
        if (status := self._process.poll()) is not None:
            self._told = "ok" if status == 0 else f"failed with status {status}"
        elif time.monotonic() - self._start > self._seconds:
            self.kill()
            self._told = f"ended by its limit of {self._seconds:.0f} s"
        return bool(self._told)

    def kill(self) -> None:
        """End it and its children: a step starts trainings of its own."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def found(self) -> dict[str, Any]:
        """What came of it, or has come until now."""
        seconds, status = round(time.monotonic() - self._start, 1), self._told or UNDER_WAY
        found: dict[str, Any] = {"question": self.step.question, "status": status, "seconds": seconds}
        if status not in ("ok", UNDER_WAY):
            found["last_lines"] = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
        return found | {"figures": read_figures(figures_file(self._folder, self.step.name))}


def side_by_side(
    steps: Sequence[Step], at_once: int, start: Callable[[Step], Running | None]
) -> Iterator[tuple[Step, dict[str, Any] | None]]:
    """Run steps, so many at a time, and give each with what has come of it: when it starts, every few seconds, and when
    it has ended.

    Args:
        steps: in the order in which they are started.
        at_once: how many run beside each other.
        start: starts one, or gives None where there is no time left for it.
    """
    waiting, running, shown = deque(steps), list[Running](), time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                step = waiting.popleft()
                started = start(step)
                if started is None:
                    yield step, None
                else:
                    running.append(started)
                    yield step, started.found()
            time.sleep(_POLL)
            for each in [each for each in running if each.ended()]:
                running.remove(each)
                yield each.step, each.found()
            if time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                for each in running:
                    yield each.step, each.found()
    finally:
        for each in running:
            each.kill()
