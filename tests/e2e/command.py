"""The command line as a user types it, in this process: a subprocess costs seconds of imports. A pytest plugin."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Finished:
    """A finished command: exit status and what it printed."""

    code: int
    out: str
    err: str

    def refuses(self, *told: str) -> None:
        """Assert exit status 1 and one paragraph on stderr, no traceback, that tells all of `told`."""
        assert self.code == 1, self.err
        assert "Traceback" not in self.err
        assert "error: internal" not in self.err, self.err
        # What comes before is log lines and progress bars.
        lines = self.err.splitlines()
        (start,) = (number for number, line in enumerate(lines) if line.startswith("error: "))
        message = "\n".join(lines[start:])
        assert all(lines[start:]), message
        assert len(message) < 1000
        for text in told:
            assert text in message, message


Command = Callable[..., Finished]


@pytest.fixture
def vipo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``vipo(*arguments)`` runs the console script's function; errors that it lets through fail the test."""
    from vipo.cli import main

    def run(*arguments: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", ["vipo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code
        return Finished(int(code or 0), *capsys.readouterr())

    return run
