"""A checkpoint is whole or absent, a damaged one is named and passed over, an optimizer continues exactly."""

import errno
import json
import logging
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from vipo.config.values import config_hash
from vipo.provenance import StorageError, atomic_file, atomic_folder
from vipo.provenance.files import file_sha256
from vipo.provenance.records import PROVENANCE, files_below
from vipo.training import checkpoints
from vipo.training.checkpoints import (
    CheckpointError,
    StoredTensors,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    prune_checkpoints,
    save_checkpoint,
)
from vipo.training.state import content_hash


def _save(root: Path, update: int) -> Path:
    return save_checkpoint(root, update, {"w": torch.full((3,), float(update))}, {"identity": "a", "done": update})


def _tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    folder = save_checkpoint(
        tmp_path, 7, {"a": shared, "b": shared.T, "n": torch.tensor(3)}, {"x": [1, "é"], "y": None}
    )
    found = load_checkpoint(folder)
    assert found.update == 7
    assert found.state == {"x": [1, "é"], "y": None}
    assert torch.equal(found.tensors["a"], shared)
    assert torch.equal(found.tensors["b"], shared.T)
    assert found.tensors["n"].item() == 3


def test_newest_first_and_pruned(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    assert load_newest(tmp_path / "none") is None
    for update in (9, 10, 100):
        _save(tmp_path, update)
    (tmp_path / ".000200.partial").mkdir()
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [100, 10, 9]
    prune_checkpoints(tmp_path, 100, 2)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [100, 10]
    # A run that passed over the damaged 100 and 10 has just written 3: that one must stay.
    _save(tmp_path, 3)
    prune_checkpoints(tmp_path, 3, 1)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2) / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        # The last quarter: inside the tensors, a value or a hash, so that the file still parses as its format.
        at = len(data) * 3 // 4
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes({"truncated": data[:-3], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"000002.*damaged"):
        load_checkpoint(path.parent)
    with caplog.at_level(logging.WARNING):
        found = load_newest(tmp_path)
    assert found is not None
    assert found.update == 1
    assert "000002" in caplog.text
    assert "the checkpoint before it is used" in caplog.text


def test_manifest_of_another_shape_is_damage(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    (folder / "manifest.json").write_text(json.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder)


def test_full_disk_is_a_clear_error_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    before = _tree(tmp_path)

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: None) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    for update in (2, 3):
        with pytest.raises(StorageError, match=f"00000{update}: cannot be written .*No space left.*free disk space"):
            _save(tmp_path, update)
        assert _tree(tmp_path) == before
    found = load_newest(tmp_path)
    assert found is not None
    assert found.update == 2


def test_safetensors_own_error_type_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"), atomic_folder(tmp_path / "target") as folder:
        save_file({"w": torch.zeros(1)}, folder / "absent" / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_atomic_folder_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert _tree(tmp_path) == {"target/a": b"old"}


def test_atomic_folder_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    for name in ("a", "b"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
    assert _tree(tmp_path) == {"deep/target/sub/b": b"b"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_atomic_folder_puts_the_old_one_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    rename = os.rename

    def refuse(source: Path, destination: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(StorageError, match="Input/output error"), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
    assert _tree(tmp_path) == {"target/a": b"old"}


@pytest.mark.parametrize("error", [ValueError("bad"), OSError(errno.ENOSPC, "No space left on device")])
def test_atomic_file_leaves_the_old_one(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "sub" / "target.json"
    with atomic_file(target) as path:
        path.write_text("old")
    expected = StorageError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with atomic_file(target) as path:
            path.write_text("new")
            raise error

    with pytest.raises(expected):
        fail()
    assert _tree(tmp_path) == {"sub/target.json": b"old"}
    with atomic_file(target) as path:
        path.write_text("new")
    assert _tree(tmp_path) == {"sub/target.json": b"new"}


def test_prefixes_are_inverse(tmp_path: Path) -> None:
    tensors = {"a/b": torch.zeros(1), "c": torch.ones(1)}
    both = prefixed("x", tensors) | prefixed("xy", {"z": torch.ones(2)})
    save_checkpoint(tmp_path, 1, both, {})
    found = load_newest(tmp_path)
    assert found is not None
    assert dict(found.tensors.below("x")) == tensors
    assert dict(found.tensors.below("x").below("a")) == {"b": torch.zeros(1)}


def _write_pieces(folder: Path, whole: dict[str, torch.Tensor], pieces: int) -> list[Path]:
    """As processes write them that hold ``ceil(rows / pieces)`` rows each."""
    files = []
    for index in range(pieces):
        held, rows = {}, {}
        for name, value in whole.items():
            size = -(-len(value) // pieces)
            start, stop = (min(index * size, len(value)) for index in (index, index + 1))
            rows[name] = (start, stop, len(value))
            if stop > start:
                held[name] = value[start:stop].clone()
        files.append(folder / f"{index}.safetensors")
        save_file(held, files[-1], {"rows": json.dumps(rows)})
    return files


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=3), pieces=st.integers(1, 5), readers=st.integers(1, 5))
def test_pieces_are_read_back_by_any_number_of_readers(rows: list[int], pieces: int, readers: int) -> None:
    whole = {f"p/{n}": torch.arange(count * 2.0).reshape(count, 2) + 100 * n for n, count in enumerate(rows)}
    with tempfile.TemporaryDirectory() as folder:
        stored = StoredTensors(_write_pieces(Path(folder), whole, pieces)).below("p")
        assert len(stored) == len(rows)
        for name, value in stored.items():
            assert torch.equal(value, whole[f"p/{name}"])
            size = -(-len(value) // readers)
            for reader in range(readers):
                start, stop = (min(r * size, len(value)) for r in (reader, reader + 1))
                assert torch.equal(stored.rows(name, start, stop), value[start:stop])


def test_a_missing_piece_is_found(tmp_path: Path) -> None:
    files = _write_pieces(tmp_path, {"w": torch.ones(6, 1)}, 3)
    for left in (files[1:], files[:2], [files[0], files[2]], [*files, files[0]]):
        with pytest.raises(CheckpointError, match="the pieces of 'w' are not the whole of it"):
            StoredTensors(left)


@pytest.mark.parametrize(
    "rows", ["[]", "3", "{", '{"w": 3}', '{"w": [0, 1]}', '{"w": ["0", 2, 2]}', '{"w": [0, 2, 2]}']
)
def test_rows_that_tell_nothing_are_damage(tmp_path: Path, rows: str) -> None:
    """Although the manifest fits: one process's file says itself which rows of its tensors it holds."""
    folder = _save(tmp_path, 1)
    file = folder / "tensors.safetensors"
    save_file({"w": torch.ones(1) if "2, 2" in rows else torch.tensor(1.0)}, file, {"rows": rows})
    hashes = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(hashes | {file.name: file_sha256(file)}))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def _model() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (index + 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))


def _step(model: torch.nn.Linear, optimizer: torch.optim.AdamW, number: int) -> None:
    inputs = torch.linspace(-2, 3, 20).reshape(5, 4) * number
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def test_a_step_after_restore_equals_a_step_without(tmp_path: Path) -> None:
    model, optimizer = _model()
    for number in (1, 2, 3):
        _step(model, optimizer, number)
    tensors = prefixed("network", model.state_dict()) | prefixed("optimizer", optimizer_tensors(optimizer))
    save_checkpoint(tmp_path, 3, tensors, {})
    found = load_newest(tmp_path)
    assert found is not None
    restored, its_optimizer = _model()
    restored.load_state_dict(dict(found.tensors.below("network")))
    load_optimizer_tensors(its_optimizer, found.tensors.below("optimizer"))
    for number in (4, 5):
        _step(model, optimizer, number)
        _step(restored, its_optimizer, number)
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    without, fresh = _model()
    without.load_state_dict(dict(found.tensors.below("network")))
    for number in (4, 5):
        _step(without, fresh, number)
    assert not torch.equal(without.weight, model.weight), "the optimizer's state must matter for this test"


def test_weights_behind_a_link_are_part_of_a_folder(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "generator", tmp_path / "elsewhere"
    for name in ("vae/config.json", "vae-2/config.json", "vae.json", "note.txt", PROVENANCE, "vae/deep/er.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    listed = ["vae/config.json", "vae/deep/er.safetensors", "vae-2/config.json", "vae.json"]
    # In this order, as before links were followed: a finished run keeps its identity.
    plain = config_hash([[name, file_sha256(folder / name)] for name in listed])
    assert content_hash(folder) == plain
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("weights")
    (folder / "transformer").symlink_to(elsewhere)
    # Without an end, and without what is not there.
    (elsewhere / "again").symlink_to(folder)
    (elsewhere / "lost.json").symlink_to(tmp_path / "nowhere")
    assert "transformer/again" in files_below(folder)
    linked = content_hash(folder)
    assert linked != plain
    (elsewhere / "model.safetensors").write_text("others")
    assert content_hash(folder) not in (plain, linked)
