"""Uploads against fsspec's memory store, local folders and an S3 server on this machine (moto's)."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vipo.config.compose import repository_root
from vipo.provenance import record_stage
from vipo.provenance.upload import UploadError, upload_folder

NAMES = ["provenance.json", "weights/a.safetensors", "ünicode name.txt"]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # No diff of this checkout, whatever state it is in.
    monkeypatch.setattr("vipo.provenance.environment.code_folder", lambda: None)
    folder = tmp_path / "results" / "demo"
    with record_stage("train", folder, inputs=[], outputs=[folder / "weights"], config=None, root=tmp_path):
        (folder / "weights").mkdir(parents=True)
        (folder / "weights" / "a.safetensors").write_bytes(bytes(range(256)) * 4096)
    (folder / "ünicode name.txt").write_text("x")
    (folder / ".lock").write_text("")
    return folder


def _listing(folder: Path) -> str:
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in NAMES)


def test_a_folder_arrives_whole_and_sha256sum_checks_it(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there" / "demo"
    assert upload_folder(folder, f"file://{there}/", tmp_path) == (NAMES, [])
    assert {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()} == {*NAMES, "SHA256SUMS"}
    assert (there / "SHA256SUMS").read_text() == _listing(folder)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=there, check=True)


def test_only_what_changed_is_sent_again(folder: Path, tmp_path: Path, memory: MemoryFileSystem) -> None:
    upload_folder(folder, "memory://bucket/demo", tmp_path)
    assert upload_folder(folder, "memory://bucket/demo", tmp_path) == ([], NAMES)
    (folder / "ünicode name.txt").write_text("y")
    assert upload_folder(folder, "memory://bucket/demo", tmp_path) == (NAMES[2:], NAMES[:2])
    assert memory.cat_file("/bucket/demo/ünicode name.txt") == b"y"
    (folder / "ünicode name.txt").unlink()
    assert upload_folder(folder, "memory://bucket/demo", tmp_path) == ([], NAMES[:2])
    assert "ünicode" not in memory.cat_file("/bucket/demo/SHA256SUMS").decode()


def test_a_name_may_hold_what_unicode_takes_for_the_end_of_a_line(folder: Path, tmp_path: Path) -> None:
    (folder / "a\u2028b\x85c.txt").write_text("x")
    url = f"file://{tmp_path}/there"
    names = sorted([*NAMES, "a\u2028b\x85c.txt"])
    assert upload_folder(folder, url, tmp_path) == (names, [])
    assert upload_folder(folder, url, tmp_path) == ([], names)


@pytest.mark.parametrize("local", [False, True])
def test_what_the_store_lost_or_changed_is_sent_again(
    folder: Path, tmp_path: Path, memory: MemoryFileSystem, local: bool
) -> None:
    url = f"file://{tmp_path}/there" if local else "memory://bucket/demo"
    store, base = fsspec.core.url_to_fs(url)
    upload_folder(folder, url, tmp_path)
    store.rm_file(f"{base}/weights/a.safetensors")
    store.pipe_file(f"{base}/ünicode name.txt", b"longer")
    assert upload_folder(folder, url, tmp_path) == (NAMES[1:], NAMES[:1])
    # As long as before, so that only reading it tells.
    store.pipe_file(f"{base}/ünicode name.txt", b"y")
    assert upload_folder(folder, url, tmp_path) == ([], NAMES)
    assert upload_folder(folder, url, tmp_path, read_back=True) == (NAMES[2:], NAMES[:2])
    for name in NAMES:
        assert store.cat_file(f"{base}/{name}") == (folder / name).read_bytes()
    assert store.cat_file(f"{base}/SHA256SUMS").decode() == _listing(folder)


def test_the_manifest_is_last_and_empty_until_then(
    folder: Path, tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(folder, "memory://bucket/demo", tmp_path)
    for name in NAMES[:2]:
        memory.rm_file(f"/bucket/demo/{name}")
    memory.pipe_file("/bucket/demo/SHA256SUMS", b"0" * 64 + b"  weights/a.safetensors\n")
    put = MemoryFileSystem.put_file

    def broken(self: MemoryFileSystem, local: str, target: str, **options: object) -> None:
        assert memory.cat_file("/bucket/demo/SHA256SUMS") == b""
        if "weights" in target:
            raise ConnectionError("the line is down")
        put(self, local, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", broken)
    with pytest.raises(UploadError, match=r"memory://bucket/demo: the line is down; .*upload again"):
        upload_folder(folder, "memory://bucket/demo", tmp_path)
    assert memory.cat_file("/bucket/demo/SHA256SUMS") == b""
    monkeypatch.undo()
    assert upload_folder(folder, "memory://bucket/demo", tmp_path) == (NAMES, [])
    assert memory.cat_file("/bucket/demo/SHA256SUMS").decode() == _listing(folder)


def test_what_arrives_damaged_is_named(
    folder: Path, tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damages(self: MemoryFileSystem, local: str, target: str, **options: object) -> None:
        self.pipe_file(target, Path(local).read_bytes()[:-1])

    monkeypatch.setattr(MemoryFileSystem, "put_file", damages)
    with pytest.raises(UploadError, match=r"demo/provenance\.json: SHA-256 .* arrived, .* was read from"):
        upload_folder(folder, "memory://bucket/demo", tmp_path)
    assert memory.cat_file("/bucket/demo/SHA256SUMS") == b""


def test_what_changed_since_it_was_recorded_is_not_sent(folder: Path, tmp_path: Path, memory: MemoryFileSystem) -> None:
    weights = folder / "weights" / "a.safetensors"
    weights.write_bytes(b"other")
    with pytest.raises(UploadError, match=r"a\.safetensors: is not what .*provenance\.json recorded"):
        upload_folder(folder, "memory://bucket/demo", tmp_path)
    weights.unlink()
    with pytest.raises(UploadError, match=r"a\.safetensors: is not what .* \(missing"):
        upload_folder(folder, "memory://bucket/demo", tmp_path)
    assert memory.find("/bucket/demo") == ["/bucket/demo/SHA256SUMS"]


def test_addresses_and_folders_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    for url, told in {
        "bucket/demo": "is no address of an object store",
        "nowhere://bucket": r"Protocol not known: nowhere; .*extra 'cloud'",
        f"file://{folder}/.lock/x": r"\.lock/x: .*check address",
    }.items():
        with pytest.raises(UploadError, match=told):
            upload_folder(folder, url, tmp_path)
    with pytest.raises(UploadError, match="nothing: is no folder"):
        upload_folder(tmp_path / "nothing", "memory://bucket", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UploadError, match="empty: holds no file to upload"):
        upload_folder(tmp_path / "empty", "memory://bucket", tmp_path)


def test_s3_through_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moto.server import ThreadedMotoServer

    from vipo.cli import app

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.chdir(repository_root())
        with pytest.raises(UploadError, match=r"s3://bucket/vipo: .*bucket does not exist.*check address"):
            app(["upload", str(folder), "s3://bucket/vipo"], standalone_mode=False)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("bucket")
        app(["upload", str(folder), "s3://bucket/vipo"], standalone_mode=False)
        told = "files sent and read back; 0 were there (by SHA256SUMS and size, not read back)"
        assert capsys.readouterr().out == f"s3://bucket/vipo: 3 {told}\n"
        store.invalidate_cache()
        assert sorted(store.find("bucket")) == sorted(f"bucket/vipo/{name}" for name in [*NAMES, "SHA256SUMS"])
        assert store.cat_file("bucket/vipo/SHA256SUMS").decode() == _listing(folder)
        store.rm_file("bucket/vipo/weights/a.safetensors")
        app(["upload", str(folder), "s3://bucket/vipo"], standalone_mode=False)
        assert ": 1 files sent and read back; 2 were there (by" in capsys.readouterr().out
        store.pipe_file("bucket/vipo/ünicode name.txt", b"y")
        app(["upload", str(folder), "s3://bucket/vipo", "--read-back"], standalone_mode=False)
        assert ": 1 files sent and read back; 2 were there (read back)" in capsys.readouterr().out
    finally:
        server.stop()


def test_a_store_that_is_not_aws_s_is_told_of_checksums(
    folder: Path, tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError("x-amz-checksum-crc32 is not implemented")

    monkeypatch.setattr("vipo.provenance.upload._store", lambda _: (memory, "/bucket/demo"))
    monkeypatch.setattr(memory, "pipe_file", refuses)
    with pytest.raises(UploadError, match=r"not implemented; .*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        upload_folder(folder, "s3://bucket/demo", tmp_path)
    with pytest.raises(UploadError) as error:
        upload_folder(folder, "memory://bucket/demo", tmp_path)
    assert "CHECKSUM" not in str(error.value)
