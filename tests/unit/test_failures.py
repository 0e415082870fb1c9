"""Where tracebacks go."""

from pathlib import Path

import pytest

from vipo.failures import keep_traceback


def test_a_traceback_that_no_folder_takes_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = keep_traceback(ValueError("gone"), blocked)
    assert kept is not None
    assert kept.is_relative_to(tmp_path)
    assert "ValueError: gone" in kept.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    assert keep_traceback(ValueError("gone"), blocked) is None
