"""The process of a reward that vipo starts: in its own environment, and gone when vipo is."""

import contextlib
import json
import os
import secrets
import select
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from vipo.rewards.errors import RewardError
from vipo.text import one_line

_VARIABLE = "VIPO_REWARD_TOKEN"
_LAST_LINES, _LAST_BYTES = 3, 4000


class Child:
    """A server that was started here.

    Args:
        command: gives a server that ends with its standard input and tells its port on its standard output; what names
            the variable of its token is added.
        patience: seconds until it must have told its port.
        called: begins each message.

    Raises:
        RewardError: it cannot be started, or ended, or was not ready in time.
    """

    def __init__(self, command: Sequence[str], patience: float, called: str) -> None:
        self.token = secrets.token_urlsafe(32)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        try:
            self._process = subprocess.Popen(
                [*command, "--with-parent", "--token-env", _VARIABLE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=os.environ | {_VARIABLE: self.token},
                # Ctrl-C is for vipo, which then ends it.
                start_new_session=True,
            )
        except OSError as error:
            raise RewardError(f"{called}: {command[0]} cannot be started ({error.strerror})") from error
        self._finalizer = weakref.finalize(self, _end, self._process, self._said)
        try:
            self.url = f"http://127.0.0.1:{self._port(patience, called)}"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        self._finalizer()

    def gone(self) -> str | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        told = f"signal {-status}" if status < 0 else f"status {status}"
        return f"{told}; its last words: {self._last_words()}"

    def _port(self, patience: float, called: str) -> int:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], patience)
        if not ready:
            raise RewardError(
                f"{called}: not ready after {patience:g} s; its last words: {self._last_words()}; raise start_timeout"
            )
        line = self._process.stdout.readline()
        try:
            port = json.loads(line)["port"]
        except (ValueError, TypeError, KeyError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            raise RewardError(f"{called}: could not be started ({self.gone() or 'it tells no port'})") from error
        return int(port)

    def _last_words(self) -> str:
        size = os.fstat(self._said.fileno()).st_size
        text = os.pread(self._said.fileno(), _LAST_BYTES, max(0, size - _LAST_BYTES)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return one_line(" | ".join(lines[-_LAST_LINES:]), 600) or "none"


def python_of(environment: str, root: Path) -> Path:
    """The interpreter of a virtual environment, named by its folder or by the interpreter.

    Raises:
        RewardError: there is none.
    """
    place = root / environment
    # Not resolved: an environment is told by the place of its link to the interpreter.
    python = place / "bin" / "python" if place.is_dir() else place
    if not os.access(python, os.X_OK):
        raise RewardError(
            f"environment {environment!r}: there is no {python}; make it as docs/reward_process.md says, or mend the "
            "path"
        )
    return python


def _end(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    # Its standard input ends, and it with it; one that hangs is ended.
    for stream in (process.stdin, process.stdout, said):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
        process.wait()
