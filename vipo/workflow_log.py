"""What a person sees of the workflow: one line a job, where each run stands, the time left; errors once, and last.

Snakemake's own account stays whole in ``.snakemake/log``, a stage's in its log file.
"""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

from vipo.standing import read_error, read_standing
from vipo.text import visible

_ORIGIN = re.compile(r'^\w+(?: in rule \w+)? in file "[^"]*", line \d+:\n')
_STAGE_FAILED = re.compile(r"\bCalledProcessError\b|^WorkflowError:?\s*At least one job did not complete")
_KEPT = "finished jobs stay, training goes on from its newest checkpoint"
#: Rules that a run's count of jobs holds and nobody waits for.
_NO_JOBS = ("all", "total")


_REPEATED = "Exiting because a job execution failed."
_NO_NEWS = ("Building DAG of jobs...", "Assuming unrestricted shared filesystem usage.")


@dataclass(frozen=True)
class _Job:
    """A job of the workflow: its rule, its wildcards' values (or ""), its log file; when it was started, in seconds."""

    rule: str
    run: str
    log: Path
    started: float

    @property
    def name(self) -> str:
        return f"{self.rule} {self.run}".rstrip()


class WorkflowLog(logging.Handler):
    """In the place of Snakemake's handler of the terminal, which still shows what is said before the first job.

    Args:
        own: Snakemake's handler. Of a dry run, and where the user asked for quiet, it shows everything but errors.
        again: the command that goes on with the workflow.
        quiet: leave jobs and progress to `own`.
        clock: seconds, monotonic.
    """

    def __init__(
        self, own: "logging.StreamHandler[Any]", again: str, quiet: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._own, self._again, self._quiet, self._clock = own, again, quiet, clock
        self._library = str(Path(sys.modules[type(own).__module__].__file__ or "").parent) + os.sep
        self._terminal = bool(own.stream.isatty()) and os.environ.get("TERM") != "dumb"
        self._began: float | None = None
        self._waiting: Counter[str] = Counter()
        self._running: dict[int, _Job] = {}
        self._failed: dict[int, _Job] = {}
        self._took: dict[str, list[float]] = {}
        self._lanes = self._done = self._total = self._drawn = 0
        self._errors: list[str] = []
        self._locked = self._interrupted = self._asked = self._closed = False
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if _in_main_thread():
            for number in self._before:
                signal.signal(number, self._leave)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, or keep it for the end."""
        event = getattr(record, "event", None)
        if event == "error":
            self._keep(record)
            return
        if event == "workflow_started":
            self._began = self._clock()
        elif event == "job_info":
            # From here on Snakemake stops its jobs itself.
            self._hear_interrupts_again()
        if record.getMessage().startswith("Terminating processes on user request"):
            self._interrupted = True
        if record.getMessage().startswith("Will exit after finishing") and not self._asked:
            # SIGTERM.
            self._asked = True
            self._say("asked to stop: no other job starts, those that run are waited for (Ctrl-C stops them)")
        if self._quiet or self._began is None:
            if record.getMessage() not in _NO_NEWS:
                self._own.handle(record)
        else:
            self._follow(record, event)

    def _follow(self, record: logging.LogRecord, event: Any) -> None:
        told: dict[str, Any] = vars(record)
        match event:
            case "run_info":
                self._waiting = Counter({rule: n for rule, n in told["stats"].items() if rule not in _NO_JOBS})
                self._total = self._waiting.total()
            case "job_info" if told["log"]:
                run = " ".join(map(str, dict(told["wildcards"]).values()))
                self._start(told["jobid"], _Job(told["rule_name"], run, Path(told["log"][0]), self._clock()))
            case "job_finished":
                self._finish(told["job_id"])
            case "job_error":
                self._fail(told["jobid"], told)
            case None if record.getMessage().startswith(_REPEATED):
                pass
            case None if record.levelno > logging.INFO or not record.pathname.startswith(self._library):
                self._erase()
                self._own.handle(record)
            case _:
                pass

    def _start(self, number: int, job: _Job) -> None:
        if self._failed.pop(number, None) is None:
            self._waiting[job.rule] -= 1
        self._running[number] = job
        self._lanes = max(self._lanes, len(self._running))
        if not self._ticker.is_alive() and not self._over.is_set():
            self._ticker.start()
        self._draw()

    def _finish(self, number: int) -> None:
        job = self._running.pop(number, None)
        if job is None:
            return
        seconds = self._clock() - job.started
        self._took.setdefault(job.rule, []).append(seconds)
        self._done += 1
        standing = read_standing(job.log)
        reward = f", reward {standing.reward}" if standing is not None and standing.reward else ""
        self._say(f"[{self._done}/{self._total}] {job.name}: {_duration(seconds)}{reward}{self._left(', ')}")

    def _fail(self, number: int, told: dict[str, Any]) -> None:
        job = self._running.pop(number, None)
        if job is None:
            self._errors.append(f"{told['rule_name']}: {told['rule_msg'] or 'failed'}")
            return
        self._failed[number] = job
        if not self._interrupted:
            self._say(f"{job.name} failed after {_duration(self._clock() - job.started)}")

    def _keep(self, record: logging.LogRecord) -> None:
        # Of others, in part: keys, names of files, what a library says.
        text = visible(record.getMessage())
        self._locked |= getattr(record, "exception", "") == "LockException"
        # Of a stage that failed, its own error tells more.
        if not _STAGE_FAILED.search(text):
            lines = _ORIGIN.sub("", text).splitlines()
            lines = [line for line in lines if line.strip() and not line.startswith('  File "')]
            self._errors.append("\n".join(lines).removeprefix("LockException:\n").removeprefix("Error: "))

    def close(self) -> None:
        """Tell how the workflow ended: its errors, and in the last line how to go on."""
        with self.lock or contextlib.nullcontext():
            if not self._closed:
                self._closed = True
                self._over.set()
                self._hear_interrupts_again()
                self._end()
        super().close()

    def _end(self) -> None:
        self._erase()
        failed = [] if self._interrupted else list(self._failed.values())
        told: dict[str, list[_Job]] = {}
        for job in failed:
            told.setdefault(read_error(job.log) or "error: the log is empty", []).append(job)
        for error, jobs in told.items():
            names, logs = ", ".join(job.name for job in jobs), " ".join(str(job.log) for job in jobs)
            self._write(f"{names} failed; log: {logs}\n{error}")
        for text in self._errors:
            self._write(f"error: {text}")
        if self._interrupted or self._asked:
            self._write("stopped on request")
        if self._locked:
            # Outside of make, nobody has its PATH.
            program = os.path.relpath(sys.argv[0]) if "VIPO_AGAIN" in os.environ else "snakemake"
            unlock = shlex.join([program, "--unlock", *sys.argv[1:]])
            self._write(f"to go on: where no other snakemake works in this folder, {unlock}; then {self._again}")
        elif self._interrupted or (self._asked and not failed):
            self._write(f"to go on: {self._again} ({_KEPT})")
        elif self._errors and self._errors[-1].rpartition("\n")[2].startswith("to go on "):
            # The error has said so itself.
            pass
        elif failed or (self._errors and self._began is not None):
            self._write(f"to go on: mend that, then {self._again} ({_KEPT})")
        elif self._errors:
            self._write(f"to go on: mend that, then {self._again} (nothing was started)")
        elif self._began is not None and not self._quiet:
            took = _duration(self._clock() - self._began)
            self._write(f"{self._done} jobs done in {took}" if self._total else "nothing to be done: all is finished")

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        self._closed = True
        self._hear_interrupts_again()
        self._write("\nstopped while the workflow was being read; nothing was started\nto go on: " + self._again)
        raise SystemExit(128 + number)

    def _hear_interrupts_again(self) -> None:
        for number, before in self._before.items():
            # Snakemake may have set its own meanwhile.
            if _in_main_thread() and signal.getsignal(number) == self._leave:
                signal.signal(number, before)

    def _tick(self) -> None:
        while not self._over.wait(1 if self._terminal else 30):
            with self.lock or contextlib.nullcontext():
                if self._over.is_set() or not self._running:
                    continue
                if self._terminal:
                    self._draw()
                else:
                    self._write("\n".join(self._standings()))

    def _standings(self) -> list[str]:
        lines = []
        for job in self._running.values():
            standing = read_standing(job.log)
            if standing is None:
                lines.append(f"  {job.name:<20} {_duration(self._clock() - job.started)} so far")
                continue
            drawn = "#" * round(20 * standing.share)
            reward = f"  reward {standing.reward}" if standing.reward else ""
            lines.append(
                f"  {job.name:<20} [{drawn:.<20}] {standing.done}/{standing.total}  {standing.left} left{reward}"
            )
        return [*lines, f"  {self._done} of {self._total} jobs done{self._left(', ')}"]

    def _left(self, before: str) -> str:
        """About how long the rest takes, or nothing where that cannot be known yet."""
        known = {rule: fmean(seconds) for rule, seconds in self._took.items()}
        running = 0.0
        for job in self._running.values():
            elapsed = self._clock() - job.started
            standing = read_standing(job.log)
            if standing is not None and standing.share > 0:
                known.setdefault(job.rule, elapsed / standing.share)
                running += elapsed / standing.share - elapsed
            else:
                running += max(0.0, known.get(job.rule, 0.0) - elapsed)
        waiting = +self._waiting
        # Rules of many jobs decide; of one that has not run yet, the others say what is likely.
        many = [known[rule] for rule, jobs in waiting.items() if jobs > 1 and rule in known]
        if any(jobs > 1 for jobs in waiting.values()) and not many:
            return ""
        likely = fmean(many) if many else 0.0
        rest = sum(jobs * known.get(rule, likely if jobs > 1 else 0.0) for rule, jobs in waiting.items())
        if not waiting and not self._running:
            return ""
        minutes = (running + rest) / max(1, self._lanes) / 60
        return f"{before}about {round(minutes)} minutes left" if minutes >= 1.5 else f"{before}about a minute left"

    def _say(self, line: str) -> None:
        self._erase()
        self._write(line)
        self._draw()

    def _draw(self) -> None:
        if self._terminal and self._running:
            self._erase()
            try:
                width = os.get_terminal_size(self._own.stream.fileno()).columns
            except OSError:
                self._terminal = False
                return
            lines = [line[: width - 1] for line in self._standings()]
            self._drawn = len(lines)
            self._write("\n".join(lines))

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\x1b[{self._drawn}A\x1b[J", end="")
            self._drawn = 0

    def _write(self, text: str, end: str = "\n") -> None:
        # The terminal may be closed, its reader killed, a log's disk full: the jobs go on, and nothing is drawn over.
        try:
            self._own.stream.write(text + end)
            self._own.stream.flush()
        except OSError:
            self._terminal, self._drawn = False, 0


def show_plainly(settings: Any) -> None:
    """Put a `WorkflowLog` in the place of Snakemake's handler of the terminal, unless all messages are asked for.

    Args:
        settings: Snakemake's `OutputSettings`.
    """
    logger = logging.getLogger("snakemake.logging")
    own = next((handler for handler in logger.handlers if handler.name == "DefaultStreamHandler"), None)
    if not isinstance(own, logging.StreamHandler) or settings.verbose or settings.debug_dag:
        return
    again = os.environ.get("VIPO_AGAIN") or shlex.join(["snakemake", *sys.argv[1:]])
    quiet = bool(settings.quiet) or settings.dryrun or settings.printshellcmds
    logger.removeHandler(own)
    logger.addHandler(WorkflowLog(own, again, quiet))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
