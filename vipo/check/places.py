"""Lines on folders: which can be written, and whether what is to be written fits."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from vipo.check.line import Line, ok, to_do


def folder_lines(folders: Mapping[str, Path]) -> Iterator[Line]:
    """Whether each folder can be written, or made; a file is tried, for permissions alone do not tell."""
    for name, folder in folders.items():
        place = existing(folder)
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            yield to_do(name, f"{place}: cannot be written ({error.strerror}); mend its permissions, or choose another")
        else:
            yield ok(name, f"{folder}: can be {'written' if place == folder else 'made'}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    found = Path(os.path.abspath(folder))  # noqa: PTH100 (a broken link in it must not be followed)
    while not found.is_dir() and found != found.parent:
        found = found.parent
    return found


def disk_line(folder: Path, runs: int, each: int) -> Line:
    """Whether the runs of an experiment fit on a disk.

    Args:
        folder: that is written.
        runs: how many are trained.
        each: bytes of one, at most.
    """
    free, needed = shutil.disk_usage(existing(folder)).free, runs * each
    told = f"{free / 2**30:.1f} GiB free under {folder}, {runs} runs need {needed / 2**30:.1f} GiB at most"
    if free < needed:
        return to_do("disk", f"{told}; free space, choose --results, or lower training.keep_checkpoints or save_at")
    return ok("disk", told)
