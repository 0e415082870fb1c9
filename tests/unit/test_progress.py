"""Progress in a log: lines, and never the reason that a run fails."""

import os
import sys

import pytest

from vipo.tracking.progress import progress_bar


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=3, description="run", unit="update") as bar:
        bar.update(3)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert shown.splitlines()[-1].startswith("run: 100%")


def test_a_reader_that_died_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as dead:
        monkeypatch.setattr(sys, "stderr", dead)
        with pytest.raises(BrokenPipeError):
            dead.write("a line\n")
        with progress_bar(total=3, description="run", unit="update") as bar:
            bar.update(3)
            bar.refresh()
        monkeypatch.undo()
        # What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
