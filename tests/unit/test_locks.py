"""A file system without locks is refused: a lock that outlives its holder would be worse than none."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from filelock import FileLock

from vipo.provenance.files import StorageError, atomic_file
from vipo.provenance.locks import RunLocked, run_lock


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


def test_a_lock_of_another_user_is_named_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".lock"
    lock.touch()

    def refuse(self: FileLock, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(lock))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StorageError) as told, run_lock(tmp_path):
        pytest.fail("locked")
    assert str(told.value).startswith(f"{lock}: user {lock.owner()} made it and you may not write it")
    assert "chmod -R g+rwX" in str(told.value)


def test_a_holder_that_cannot_be_read_is_not_described(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / ".lock-holder.json").write_text("[]")
        with pytest.raises(RunLocked, match="another process writes it; wait for it or stop it"), run_lock(tmp_path):
            pytest.fail("locked twice")


def test_what_a_killed_process_left_of_a_file_is_replaced_not_written(tmp_path: Path) -> None:
    """It may be another user's: who may write the folder may replace it."""
    left = tmp_path / ".a.json.partial"
    left.write_text("half")
    inode = left.stat().st_ino
    keep = tmp_path / "keep"
    keep.hardlink_to(left)
    with atomic_file(tmp_path / "a.json") as path:
        path.write_text("whole")
    assert (tmp_path / "a.json").stat().st_ino != inode
    assert keep.read_text() == "half"
