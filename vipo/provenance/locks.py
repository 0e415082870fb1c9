"""One writer per stage folder."""

import contextlib
import errno
import json
import logging
import os
import pwd
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from vipo.errors import VipoError
from vipo.provenance.files import StorageError, atomic_file

_LOCK, _HOLDER = ".lock", ".lock-holder.json"

log = logging.getLogger(__name__)


class RunLocked(VipoError):
    """Another process writes this stage's folder; the message names the folder and the holder."""


@contextlib.contextmanager
def run_lock(folder: Path, *, wait_seconds: float = 0) -> Iterator[None]:
    """Hold the only right to write `folder` while the block runs.

    The lock is the operating system's (on ``<folder>/.lock``): it is free again the moment its holder
    ends, however it ends. It is a ``flock``, which Linux keeps between the hosts of an NFS share as well (since
    2.6.12). ``<folder>/.lock-holder.json`` only says who held it last, for the message.

    Args:
        folder: stage's or run's folder; created where it is missing.
        wait_seconds: how long to wait for another holder; 0 tries once.

    Raises:
        RunLocked: another process still holds it after `wait_seconds`.
        StorageError: the folder cannot be written, or its file system keeps no locks.
    """
    holder = folder / _HOLDER
    # Without flock, filelock would take a file's existence for a lock: a killed holder would keep it.
    lock = FileLock(folder / _LOCK, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait_seconds > 0:
                log.info("%s: another process writes it%s; waiting for it", folder, _described(holder))
            lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise RunLocked(f"{folder}: another process writes it{_described(holder)}; wait for it or stop it") from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise StorageError(
                f"{folder}: its file system keeps no locks ({error}); mount it with them (Lustre: option flock; NFS: "
                "without nolock), or choose another folder"
            ) from error
        raise StorageError(_refused(folder, error)) from error
    try:
        with atomic_file(holder) as path:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _refused(folder: Path, error: OSError) -> str:
    lock = folder / _LOCK
    if isinstance(error, PermissionError) and lock.exists() and os.access(folder, os.W_OK, effective_ids=True):
        return (
            f"{lock}: user {_name(lock.stat().st_uid)} made it and you may not write it; among several users, let "
            "their group write ('chmod -R g+rwX', and umask 002 for all), or choose another results folder"
        )
    owner = (
        f" of user {_name(folder.stat().st_uid)}"
        if folder.exists() and not os.access(folder, os.W_OK, effective_ids=True)
        else ""
    )
    return f"{folder}{owner}: cannot be locked ({error}); make it writable or choose another folder"


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _described(holder: Path) -> str:
    # Between taking the lock and naming its holder there is an instant without a name; another user's may be hidden.
    try:
        entry = json.loads(holder.read_text())
        return f" (process {entry['pid']} on {entry['host']} since {entry['since']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
