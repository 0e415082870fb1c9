"""A stage's record as it lies in its folder: its files, read again, compared, found where results were moved.

``provenance.json`` names every input and output with its bytes and SHA-256. A folder is recorded file
by file; its own SHA-256 is that of the lines ``<sha256>  <path>`` (as ``sha256sum`` prints them),
sorted by path. Hidden files (`.snakemake_timestamp`, a download's `.cache`) belong to tools, not to
the data, and are left out, as is the folder's own record.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vipo.errors import VipoError
from vipo.provenance.files import file_sha256
from vipo.text import one_line

#: In a record: what rewards that compute elsewhere told of themselves, by label.
PROCESSES = "reward_processes"
PROVENANCE, DIFF, CHECKOUT_DIFF = "provenance.json", "provenance.diff", "provenance.checkout.diff"
#: How deep below the experiment's folder that of a stage lies.
_DEPTH: Mapping[str, int] = {
    "prepare": 1,
    "encode": 1,
    "train": 2,
    "sample": 2,
    "score": 2,
    "compare": 1,
    "summarize": 2,
    "report": 1,
    "credit": 2,
}

_TIMESTAMP = r"(.*/)?\.snakemake_timestamp"
_OF_TOOLS = re.compile(_TIMESTAMP)
#: What tools, locks and interrupted writes leave in an experiment, where they do, and runs that were set aside.
_OF_TOOLS_AND_LOCKS = re.compile(
    # Below runs/ an earlier vipo set runs aside.
    rf"{_TIMESTAMP}|(runs/)?\.superseded/.*"
    r"|((prompts|embeddings|configs|logs|crate|export|comparison|report(/data)?|(runs|samples|evaluation|credit)(/[^/]+(/(checkpoints|updates))?)?)/)?"
    r"\.(gitignore|lock|lock-holder\.json|[^/]+\.(partial|replaced)(/.*)?)"
)


class ProvenanceError(VipoError):
    """Lineage that cannot be recorded or does not hold; the message names the stage and the file."""


def read_provenance(path: Path) -> dict[str, Any]:
    """The record that `record_stage` wrote at `path`.

    Raises:
        ProvenanceError: the file is missing or is no such record.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ProvenanceError(f"{path}: cannot be read ({error}); run its stage again") from error
    if not (isinstance(record, dict) and isinstance(record.get("stage"), str) and _lists_files(record)):
        raise ProvenanceError(f"{path}: is not a provenance record; run its stage again")
    return record


def _lists_files(record: Mapping[str, Any]) -> bool:
    lists = [record.get(part) for part in ("inputs", "outputs")]
    return all(isinstance(entries, list) and all(map(_is_entry, entries)) for entries in lists)


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("path"), str)):
        return False
    files = entry.get("files", {})
    return isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("sha256"), str) and type(file.get("bytes")) is int
        for file in (entry, *files.values())
    )


@contextlib.contextmanager
def whole_record(path: Path) -> Iterator[None]:
    """For the block that looks into the record read from `path`: one that was edited can make it fail in any way.

    Raises:
        ProvenanceError: it did.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ProvenanceError(f"{path}: is not a whole provenance record ({reason}); run its stage again") from error


def read_processes(path: Path) -> dict[str, Any]:
    """What the record at `path` says of rewards that compute elsewhere, by label; nothing where there is no record.

    Raises:
        ProvenanceError: the file is no such record.
    """
    told: dict[str, Any] = read_provenance(path).get(PROCESSES, {}) if path.is_file() else {}
    return told


def differing_processes(told: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Each label with a run that another process scored than the first that has that label, and that first run.

    Args:
        told: of each run, what rewards that compute elsewhere told of themselves, by label.
    """
    first: dict[str, tuple[str, Any]] = {}
    for run, processes in told.items():
        for label, identity in processes.items():
            other, wanted = first.setdefault(label, (run, identity))
            if identity != wanted:
                yield label, run, other


def verify_outputs(provenance: Path, root: Path) -> list[str]:
    """One line for each recorded output that is missing, changed or, inside a recorded folder, added.

    Args:
        provenance: a ``provenance.json``.
        root: the repository root that its relative paths start at.

    Returns:
        Lines ``<path>: <what is wrong>`` in the record's order; empty when every byte is as recorded.

    Raises:
        ProvenanceError: `provenance` is missing or is no such record.
    """
    read = read_provenance(provenance)
    with whole_record(provenance):
        record = located(read, provenance.parent, root)
        return [problem for entry in record["outputs"] for problem in differences(entry, root)]


def located(record: Mapping[str, Any], folder: Path, root: Path) -> Mapping[str, Any]:
    """A stage's record with the paths of its experiment as they are now: results may have been copied or moved.

    Args:
        record: of `record_stage`.
        folder: where it lies. A record that is of no experiment's stage (a generator's), or whose outputs lie in no
            folder of that name, is left as it is.
        root: the repository root that relative paths start at.
    """
    depth = _DEPTH.get(record["stage"], 0)
    parts = absolute_path(folder).parts
    try:
        then = recorded_prefix(record, "/".join(parts[len(parts) - depth :])) if depth else ""
    except ProvenanceError:
        return record
    experiment = Path(*parts[: len(parts) - depth])
    now = "" if experiment == absolute_path(root) else f"{_recorded_path(experiment, root)}/"
    if not depth or then == now:
        return record

    def moved(entry: Mapping[str, Any]) -> dict[str, Any]:
        path = entry["path"]
        return {**entry, "path": now + path.removeprefix(then) if path.startswith(then) else path}

    return {**record, **{part: [moved(entry) for entry in record[part]] for part in ("inputs", "outputs")}}


def recorded_prefix(record: Mapping[str, Any], place: str) -> str:
    """Where the experiment's folder was when a stage was recorded; its outputs lie in `place` of it.

    Raises:
        ProvenanceError: the first output does not.
    """
    first = next(iter(record["outputs"]), {"path": ""})["path"]
    prefix, found, _ = f"{first}/".rpartition(f"{place}/")
    if not found:
        raise ProvenanceError(f"names {first or 'no file'} as output, which is not in {place}")
    return prefix


def files_below(folder: Path) -> list[str]:
    """Files of a folder, relative to it, sorted; Snakemake's marks are left out. Links to folders are followed."""
    return [name for name in _walk(folder) if not _OF_TOOLS.fullmatch(name)]


def checkpoint_files(place: Path, ends: tuple[str, ...] = (".safetensors", ".json")) -> list[Path]:
    """A file itself; of a folder its weights and configurations, sorted, but for the record of its making.

    Links to folders are followed: what is read through them decides results, too.
    """
    if place.is_file():
        return [place]
    found = (place / name for name in files_below(place) if name.endswith(ends))
    return sorted(path for path in found if path.is_file() and path != place / PROVENANCE)


def experiment_files(experiment_dir: Path) -> list[str]:
    """Files of an experiment, relative to it, sorted.

    Left out are what tools, locks and interrupted writes leave where they do, runs that were set aside, and what is
    made for others from finished results: a run's folder for the Hub (``export/``, with a manifest of its own) and the
    list that an upload leaves (``SHA256SUMS``).
    """
    names = (name for name in _walk(experiment_dir) if not _OF_TOOLS_AND_LOCKS.fullmatch(name))
    return [name for name in names if Path(name).parts[0] not in ("export", "SHA256SUMS")]


def _walk(folder: Path) -> list[str]:
    found, above = [], dict[Path, tuple[Path, ...]]()
    for base, folders, files in os.walk(folder, followlinks=True):
        place = Path(base)
        own = (*above.pop(place, ()), place.resolve())
        # A link to a folder that holds it, if only through another link, has no end: it is listed itself.
        loops = [name for name in folders if any(p.is_relative_to((place / name).resolve()) for p in own)]
        folders[:] = [name for name in folders if name not in loops]
        above |= {place / name: own for name in folders}
        found += [(place / name).relative_to(folder).as_posix() for name in (*files, *loops)]
    return sorted(found)


def is_unchanged(entry: Mapping[str, Any], root: Path) -> bool:
    """Whether a recorded input or output is there, byte for byte, with nothing added to its folder."""
    return next(differences(entry, root), None) is None


def entry_files(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a recorded input or output: path (as recorded) to ``bytes`` and ``sha256``."""
    if "files" not in entry:
        return {entry["path"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]}}
    return {f"{entry['path']}/{name}": dict(file) for name, file in entry["files"].items()}


def absolute_path(path: Path) -> Path:
    """`path` from the file system's root, without ``..`` and with its links kept."""
    # Not resolved: results/ may be a link to another disk and still belongs to the repository.
    return Path(os.path.abspath(path))  # noqa: PTH100


def entry_of(path: Path, root: Path, missing: str) -> dict[str, Any]:
    """What a record says of a file or folder; `missing` is told where it is not there."""
    recorded = _recorded_path(path, root)
    if path.is_file():
        return {"path": recorded, **_file_entry(path)}
    if not path.is_dir():
        raise ProvenanceError(f"{path}: {missing}")
    files = {name: _file_entry(path / name) for name in _folder_files(path)}
    lines = "".join(f"{file['sha256']}  {name}\n" for name, file in files.items())
    return {
        "path": recorded,
        "bytes": sum(file["bytes"] for file in files.values()),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "files": files,
    }


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _folder_files(folder: Path) -> list[str]:
    visible = (name for name in _walk(folder) if not any(part.startswith(".") for part in Path(name).parts))
    # What tells how a folder was made is no part of what was made: another day's would be another generator.
    return [name for name in visible if (folder / name).is_file() and name not in (PROVENANCE, DIFF, CHECKOUT_DIFF)]


def _recorded_path(path: Path, root: Path) -> str:
    absolute, base = absolute_path(path), absolute_path(root)
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else absolute.as_posix()


def differences(entry: Mapping[str, Any], root: Path) -> Iterator[str]:
    """One line for each file of a recorded input or output that is missing, changed or added."""
    for recorded, file in entry_files(entry).items():
        path = root / recorded
        if not path.is_file():
            yield f"{recorded}: missing"
        elif (found := file_sha256(path)) != file["sha256"]:
            yield f"{recorded}: changed (SHA-256 {found[:12]}…, recorded {file['sha256'][:12]}…)"
    if "files" in entry and (root / entry["path"]).is_dir():
        for name in _folder_files(root / entry["path"]):
            if name not in entry["files"]:
                yield f"{entry['path']}/{name}: added"
