"""Reading files that others name: a pipe would hang, a device never ends, and a file may be larger than the memory."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, most: int) -> BinaryIO:
    """A regular file of at most `most` bytes, open for reading.

    Raises:
        OSError: it cannot be opened, is larger, or is something else than a regular file; `strerror` says which.
    """
    try:
        # A pipe without a writer would not open otherwise.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "its name holds a NUL character", repr(str(path))) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = next((name for test, name in _KINDS if test(found.st_mode)), "no file")
            raise OSError(errno.EINVAL, f"it is {kind}, a regular file is needed", str(path))
        if found.st_size > most:
            raise OSError(
                errno.EFBIG, f"it has {found.st_size} bytes, at most {most} ({most / 2**20:g} MiB) are read", str(path)
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; errors as of `open_regular`."""
    with open_regular(path, most) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it grows beyond {most} bytes ({most / 2**20:g} MiB) while it is read", str(path))
    return data
