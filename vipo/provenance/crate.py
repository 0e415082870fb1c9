"""The experiment as an RO-Crate: what was run on what, by which code, and what came of it.

Its files are here, what it says of them in `crate_description`. All of it is taken from the provenance records and
configurations beside the results; nothing is looked up when the crate is written, so the same results give the same
bytes.
"""

import fnmatch
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vipo.provenance.crate_description import COPIES, CrateDescription
from vipo.provenance.files import atomic_file
from vipo.provenance.records import (
    PROVENANCE,
    ProvenanceError,
    entry_files,
    experiment_files,
    located,
    read_provenance,
    verify_outputs,
    whole_record,
)

METADATA = "ro-crate-metadata.json"
SIGNATURE = f"{METADATA}.sig"
#: Copied into the crate, so that it holds the workflow and the environment it describes.
_COPIED = ("Snakefile", "workflow/rules/*.smk", "requirements.lock")


def write_crate(experiment_dir: Path, root: Path) -> Path:
    """Describe the experiment in ``<experiment_dir>/ro-crate-metadata.json``.

    Every file of `crate_files` is a data entity with its bytes and SHA-256. Inputs that no stage wrote (prompt source,
    shipped checkpoint) are named with their SHA-256. People and licence come from ``CITATION.cff``. The workflow's
    files and ``requirements.lock`` are copied into ``<experiment_dir>/crate``. A signature of an earlier crate is
    removed, for it does not fit this one.

    Args:
        experiment_dir: folder below which stages left their ``provenance.json`` and ``config.yaml``.
        root: repository root.

    Returns:
        The path of the metadata file.

    Raises:
        ProvenanceError: no stage was recorded, an output is not as recorded, a stage read other bytes than
            another wrote, or the workflow or CITATION.cff cannot be used.
        StorageError: the metadata cannot be written.
    """
    paths = [experiment_dir / name for name in experiment_files(experiment_dir) if Path(name).name == PROVENANCE]
    if not paths:
        raise ProvenanceError(f"{experiment_dir}: holds no {PROVENANCE}; run the experiment's stages first")
    if problems := [problem for path in paths for problem in verify_outputs(path, root)]:
        raise ProvenanceError(
            "results are not as their stages wrote them; run these stages again:\n" + "\n".join(problems)
        )
    records = {path: located(read_provenance(path), path.parent, root) for path in paths}
    copies = {
        path.relative_to(root).as_posix(): path.read_bytes() for pattern in _COPIED for path in root.glob(pattern)
    }
    if "Snakefile" not in copies:
        raise ProvenanceError(f"{root}: holds no Snakefile; write the crate in a checkout of the repository")
    for name in experiment_files(experiment_dir):
        if Path(name).parts[0] == COPIES and name.partition("/")[2] not in copies:
            (experiment_dir / name).unlink()
    for name, content in copies.items():
        with atomic_file(experiment_dir / COPIES / name) as temporary:
            temporary.write_bytes(content)
    description = CrateDescription(
        experiment_dir, root, _read_citation(root / "CITATION.cff"), crate_files(experiment_dir), _written(records)
    )
    for path, record in records.items():
        with whole_record(path):
            if not all(isinstance(record[key], str) for key in ("started", "ended")):
                raise TypeError("its start or end is no text")
            description.add_stage(path.parent, record)
    # What all of them say together.
    with whole_record(experiment_dir):
        text = description.finish()
    with atomic_file(experiment_dir / METADATA) as temporary:
        temporary.write_text(text, encoding="utf-8")
        # Written, so that a full disk leaves the earlier crate and its signature; renamed after this.
        (experiment_dir / SIGNATURE).unlink(missing_ok=True)
    return experiment_dir / METADATA


def crate_files(experiment_dir: Path) -> list[str]:
    """The files that the experiment's crate names, relative to the folder, sorted.

    All of them, but the crate's own metadata and signature, the log that is being written beside it, and the content
    of checkpoints, whose ``manifest.json`` names its hashes: checkpoints serve a resume and may be many times as
    large as all results.
    """
    own = (METADATA, SIGNATURE, "logs/crate.log")
    return [
        name
        for name in experiment_files(experiment_dir)
        if name not in own and (not fnmatch.fnmatch(name, "runs/*/checkpoints/*") or name.endswith("/manifest.json"))
    ]


def zip_crate(experiment_dir: Path) -> Path:
    """Put the crate as it is described (and its signature) into ``<experiment_dir>.crate.zip``.

    The same crate gives the same bytes.

    Raises:
        ProvenanceError: there is no crate.
        StorageError: the file cannot be written.
    """
    if not (experiment_dir / METADATA).is_file():
        raise ProvenanceError(f"{experiment_dir}: holds no {METADATA}; run 'vipo crate' first")
    names = [METADATA, *(name for name in (SIGNATURE,) if (experiment_dir / name).is_file())]
    target = experiment_dir.with_name(f"{experiment_dir.name}.crate.zip")
    with atomic_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in [*names, *crate_files(experiment_dir)]:
            # A date of its own, for the file's would make every archive another.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with (
                archive.open(entry, "w", force_zip64=True) as target_stream,
                (experiment_dir / name).open("rb") as source,
            ):
                shutil.copyfileobj(source, target_stream)
    return target


def _written(records: Mapping[Path, Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, record in records.items():
        with whole_record(path):
            files = (item for entry in record["outputs"] for item in entry_files(entry).items())
            found |= {name: file["sha256"] for name, file in files}
    return found


def _read_citation(path: Path) -> dict[str, Any]:
    try:
        citation = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ProvenanceError(
            f"{path}: cannot be read ({error}); the crate takes people and licence from it"
        ) from error
    if not isinstance(citation, dict) or not {"authors", "license"} <= citation.keys():
        raise ProvenanceError(
            f"{path}: needs the keys 'authors' and 'license'; the crate takes people and licence from it"
        )
    return citation
