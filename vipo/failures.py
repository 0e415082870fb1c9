"""Where the traceback of an exception goes that nobody foresaw: a file, for it is its author's, not the user's."""

import contextlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from vipo.text import visible


def keep_traceback(error: BaseException, results: Path | None) -> Path | None:
    """Write a traceback, with the command that ended so, into a new file of ``<results>/.logs``.

    Args:
        error: with the exceptions that led to it.
        results: the command's results folder; where it has none or none can be written there, the folder for
            temporary files.

    Returns:
        The file; None where neither folder can be written, so that what went wrong is told all the same.
    """
    command = next((word for word in sys.argv[1:] if word.isalpha()), "vipo")
    told = visible("".join(traceback.format_exception(error)))
    content = f"{' '.join(sys.argv)!a}\n\n{told}"
    name = f"{command}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    # A full disk, or a folder of another user: the next one may do.
    if results is not None:
        with contextlib.suppress(OSError):
            return _written(results / ".logs" / name, content)
    with contextlib.suppress(OSError):
        return _written(Path(tempfile.mkdtemp(prefix="vipo-")) / name, content)
    return None


def where(error: BaseException) -> str:
    """File and line in which an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "nowhere"


def _written(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path
