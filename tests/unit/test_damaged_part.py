"""What an interrupted process left: made again where it is damaged, kept where it could not be read."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from vipo.evaluation.sample import _opened
from vipo.provenance.files import damaged_part


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"\x89PNG" + bytes(100)])
def test_a_picture_without_its_end_goes_away(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0-1.png"
    path.write_bytes(content)
    with damaged_part(path):
        _opened(path)
        pytest.fail("it was taken for whole")
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"12345"])
def test_tensors_without_their_end_go_away(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "part.safetensors"
    path.write_bytes(content)
    with damaged_part(path), safe_open(path, "pt"):
        pytest.fail("it was taken for whole")
    assert not path.exists()


def test_text_nested_without_end_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_text("[" * 100_000)
    with damaged_part(path):
        json.loads(path.read_text())
        pytest.fail("it was taken for whole")
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_what_the_system_would_not_let_read_stays(tmp_path: Path, number: int) -> None:
    path = tmp_path / "0-1.png"
    path.write_bytes(b"whole")
    with pytest.raises(OSError, match=os.strerror(number)), damaged_part(path):
        raise OSError(number, os.strerror(number), str(path))
    assert path.read_bytes() == b"whole"
