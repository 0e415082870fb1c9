"""Durable files: hashed, and replaced whole or not at all."""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from vipo.errors import VipoError

log = logging.getLogger(__name__)


class StorageError(VipoError):
    """The disk refused a write; the message names the target and what to do."""


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_lines(text: str) -> list[str]:
    """Lines of a text that vipo wrote: a newline ends one, no other separator that may stand inside (U+2028)."""
    return text.removesuffix("\n").split("\n") if text else []


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Create `folder` where it is missing and try to write into it, before a long computation for it.

    Raises:
        StorageError: the disk refuses.
    """
    with named_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def damaged_part(path: Path) -> Iterator[None]:
    """For the block that reads what an interrupted process left at `path`.

    Where that is damaged the block ends without an error, and the file goes away, to be made again. A file that the
    system would not let read is not damaged: its error goes on, and the file stays.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        log.warning("%s: is damaged (%s), and made again", path, error)
        path.unlink()


def partial_path(target: Path) -> Path:
    """Where what will be `target` is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


def replaced_path(target: Path) -> Path:
    """Where what was `target` waits until its successor is complete."""
    return target.with_name(f".{target.name}.replaced")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it, flushed to the disk, when the block succeeds.

    Raises:
        StorageError: the disk refused a write (full, read-only); `target` is as it was.
    """
    temporary = partial_path(target)
    with named_write_errors(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            mode = _mode_of_new_files(temporary / "mode")
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    _open_to(path, mode)
                fsync_path(path)
            fsync_path(temporary)
            replace_folder(target, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """The path of a temporary file beside `target` that replaces it, flushed to the disk, when the block succeeds.

    Raises:
        StorageError: the disk refused a write (full, read-only); `target` is as it was.
    """
    temporary = partial_path(target)
    with named_write_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Left by a process that was killed, perhaps another user's: whoever may write the folder may replace it.
            temporary.unlink(missing_ok=True)
            mode = _mode_of_new_files(temporary)
            yield temporary
            _open_to(temporary, mode)
            fsync_path(temporary)
            temporary.replace(target)
            fsync_path(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _mode_of_new_files(free: Path) -> int:
    # The umask, or the folder's default access list: neither can be read without side effects.
    free.touch()
    mode = free.stat().st_mode
    free.unlink()
    return mode


def _open_to(path: Path, mode: int) -> None:
    # safetensors makes its files readable to their owner alone, whatever the umask: a group could not share results.
    found = path.stat().st_mode
    if found | mode != found:
        path.chmod(found | mode)


def replace_folder(target: Path, replacement: Path) -> None:
    """Rename a folder, flushed to the disk, into the place of another one, which is gone then."""
    # A folder that is not empty cannot be renamed over, so the old one steps aside and comes back if it must.
    discarded = replaced_path(target)
    shutil.rmtree(discarded, ignore_errors=True)
    if target.exists():
        target.rename(discarded)
    try:
        replacement.rename(target)
    except OSError:
        if discarded.exists():
            discarded.rename(target)
        raise
    fsync_path(target.parent)
    shutil.rmtree(discarded, ignore_errors=True)


@contextlib.contextmanager
def named_write_errors(target: Path) -> Iterator[None]:
    """Around writing a part of `target` that is renamed into place later.

    Raises:
        StorageError: the disk refused a write.
    """
    try:
        yield
    # safetensors reports the operating system's error as its own type.
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(
            f"{target}: cannot be written ({reason}); free disk space, make it writable or choose another folder. "
            "What was there before is unchanged."
        ) from error
