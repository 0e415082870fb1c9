"""What an interrupted process left: made again where it is damaged, kept where it could not be read."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vipo.evaluation.held_out import check_sample, save_sample
from vipo.evaluation.sample import _opened
from vipo.provenance.files import damaged_part
from vipo.provenance.parts import load_json, load_tensors, names_of, save_json, save_tensors

TENSORS = {
    "sum": torch.tensor([0.0, -1.5, 2.0]),
    "half": torch.ones(1, 2, dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "none": torch.zeros(0, 2),
}
CONTENT = {"grid": [8, 8], "gain": -0.125, "of": {"b": 1, "a": None}}
PICTURE = torch.linspace(0, 1, 75).reshape(3, 5, 5)


def _told(path: Path) -> None:
    if names_of(path, "origin", {"prompts": "abc"}) is None:
        raise ValueError("other prompts'")


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (lambda path: save_tensors(TENSORS, path), load_tensors),
        (lambda path: save_tensors(TENSORS, path, {"prompts": "abc"}, "origin"), _told),
        (lambda path: save_json(CONTENT, path), load_json),
        (lambda path: save_sample(PICTURE, path), check_sample),
        (lambda path: save_sample(torch.stack([PICTURE, PICTURE.flip(1)]), path, 4), check_sample),
    ],
    ids=["tensors", "tensors and what they belong to", "JSON", "picture", "video"],
)
def test_no_changed_bit_goes_unnoticed(
    tmp_path: Path, write: Callable[[Path], None], read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "part"
    write(path)
    read(path)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises((ValueError, LookupError, TypeError, AttributeError, SafetensorError)):
            read(path)


def test_a_part_holds_what_was_written_whatever_the_order_of_its_names(tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "one")
    save_tensors(dict(reversed(TENSORS.items())), tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    found = load_tensors(tmp_path / "one")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    save_json(CONTENT, tmp_path / "told")
    assert list(load_json(tmp_path / "told")["of"].items()) == [("b", 1), ("a", None)]


def test_a_part_without_a_hash_as_an_older_vipo_s_is_none(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "tensors", {"part": "{}"})
    with pytest.raises(ValueError, match="no hash"):
        load_tensors(tmp_path / "tensors")
    (tmp_path / "told").write_text('{"content": 1}')
    with pytest.raises(ValueError, match="no hash"):
        load_json(tmp_path / "told")


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
