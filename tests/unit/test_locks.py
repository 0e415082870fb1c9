"""A file system without locks is refused: a lock that outlives its holder would be worse than none."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from vipo.provenance.files import StorageError
from vipo.provenance.locks import run_lock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_the_mount_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_file: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = rf"{tmp_path}: its file system keeps no locks .*mount it with them \(Lustre: option flock"
    with pytest.raises(StorageError, match=told), run_lock(tmp_path):
        pytest.fail("locked")
