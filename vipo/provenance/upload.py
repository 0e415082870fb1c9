"""A finished folder to an object store: data first, its manifest last."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from tqdm import tqdm

from vipo.errors import VipoError
from vipo.provenance.files import file_sha256, text_lines
from vipo.provenance.records import PROVENANCE, absolute_path, entry_files, files_below, located, read_provenance

MANIFEST = "SHA256SUMS"

# What botocore sends beside a file by default, not every store with S3's interface takes.
_OTHER_S3 = (
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required where the "
    "store is not AWS's own, "
)


class UploadError(VipoError):
    """What cannot be uploaded as it is; the message names the file or address and the fix."""


class Uploaded(NamedTuple):
    """Names of files, relative to the folder: those that were sent, and those that the store had."""

    sent: list[str]
    kept: list[str]


def upload_folder(folder: Path, url: str, root: Path, *, read_back: bool = False) -> Uploaded:
    """Copy the files of a folder to an object store and check there what arrived.

    ``<url>/SHA256SUMS`` (as ``sha256sum`` prints it) is written last and is empty while an upload is under way, so
    that it lists a whole upload or nothing. What it lists with the same hash and the store with the same size is not
    sent again. Hidden files (locks, time stamps) stay here, and nothing there is deleted.

    Args:
        folder: a folder of results.
        url: where it goes, for fsspec: ``s3://bucket/folder``, ``gs://bucket/folder``, ``file:///folder``.
        root: the repository root that paths in ``provenance.json`` start at.
        read_back: read what would not be sent, too: somebody may have put other bytes of the same size there.

    Raises:
        UploadError: there is nothing to upload, a file is not what its ``provenance.json`` recorded, the address
            cannot be used, or what arrived is not what was sent.
    """
    if not folder.is_dir():
        raise UploadError(f"{folder}: is no folder; give one of results/")
    visible = (name for name in files_below(folder) if not any(part.startswith(".") for part in Path(name).parts))
    names = [name for name in visible if name != MANIFEST]
    if not names:
        raise UploadError(f"{folder}: holds no file to upload; run the stage that writes it first")
    store, base = _store(url)

    def there(name: str) -> str:
        with store.open(f"{base}/{name}", "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    manifest = f"{base}/{MANIFEST}"
    try:
        before = store.cat_file(manifest) if store.exists(manifest) else b""
        # Changes nothing, and tells before gigabytes are hashed whether anything can be written.
        store.pipe_file(manifest, before)
        hashes = {name: file_sha256(folder / name) for name in tqdm(names, desc="hash", disable=None)}
        _check_recorded(folder, hashes, root)
        lines = {name: f"{hashes[name]}  {name}" for name in names}
        listed = set(text_lines(before.decode()))
        # The manifest tells what was sent once; what has become of it, the store.
        store.invalidate_cache()
        sizes = {path: entry["size"] for path, entry in store.find(base, detail=True).items()}
        kept = [
            name
            for name in names
            if lines[name] in listed and sizes.get(f"{base}/{name}") == (folder / name).stat().st_size
        ]
        if read_back:
            kept = [name for name in tqdm(kept, desc="read back", disable=None) if there(name) == hashes[name]]
        changed = sorted({*names} - {*kept})
        if changed or listed != set(lines.values()):
            store.pipe_file(manifest, b"")
        for name in tqdm(changed, desc="upload", disable=None):
            store.put_file(str(folder / name), f"{base}/{name}")
            arrived = there(name)
            if arrived != hashes[name]:
                raise UploadError(
                    f"{url}/{name}: SHA-256 {arrived[:12]}… arrived, {hashes[name][:12]}… was read from "
                    f"{folder / name}; upload again when nothing writes it"
                )
        store.pipe_file(manifest, "".join(f"{line}\n" for line in lines.values()).encode())
    except VipoError:
        raise
    # Each store has its own family of errors (botocore's are no OSErrors).
    except Exception as error:
        raise UploadError(
            f"{url}: {error or type(error).__name__}; check address, credentials and permission to write, "
            f"{_OTHER_S3 if url.startswith('s3://') else ''}and upload again"
        ) from error
    return Uploaded(changed, kept)


def _store(url: str) -> tuple[Any, str]:
    if "://" not in url:
        raise UploadError(f"{url}: is no address of an object store; write s3://bucket/folder or file:///folder")
    # Only local folders have to be made: in a store, a name with slashes is a name.
    options = {"auto_mkdir": True} if url.startswith("file://") else {}
    try:
        store, base = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UploadError(f"{url}: {error}; vipo's extra 'cloud' brings s3://, the package gcsfs gs://") from error
    return store, str(base).rstrip("/")


def _check_recorded(folder: Path, hashes: Mapping[str, str], root: Path) -> None:
    top = absolute_path(folder)
    for record in (name for name in hashes if Path(name).name == PROVENANCE):
        place = (folder / record).parent
        for entry in located(read_provenance(folder / record), place, root)["outputs"]:
            for recorded, file in entry_files(entry).items():
                path = absolute_path(root / recorded)
                if not path.is_relative_to(top):
                    continue
                found = hashes.get(path.relative_to(top).as_posix(), "missing")
                if found != file["sha256"]:
                    raise UploadError(
                        f"{path}: is not what {folder / record} recorded ({found[:12]}, not "
                        f"{file['sha256'][:12]}); run its stage again"
                    )
