"""What each stage read, wrote and ran on: recorded once, when the stage succeeds.

``provenance.json`` names every input and output with its bytes and SHA-256. A folder is recorded file
by file; its own SHA-256 is that of the lines ``<sha256>  <path>`` (as ``sha256sum`` prints them),
sorted by path. Hidden files (`.snakemake_timestamp`, a download's `.cache`) belong to tools, not to
the data, and are left out, as is the folder's own record.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vipo.config.values import config_hash
from vipo.errors import VipoError
from vipo.provenance.environment import (
    checkout_state,
    code_state,
    hardware,
    installed_sha256,
    lock_sha256,
    package_sha256,
    versions,
)
from vipo.provenance.files import atomic_file, file_sha256, replaced_path
from vipo.provenance.superseded import bring_back, is_finished, set_aside

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
#: Stages of earlier versions, and the one that writes their folder now.
_FORMER: Mapping[str, str] = {"evaluate": "score"}
#: In the environment of a launcher's ranks: the command that it was given, as JSON.
COMMAND = "VIPO_COMMAND"

_TIMESTAMP = r"(.*/)?\.snakemake_timestamp"
_OF_TOOLS = re.compile(_TIMESTAMP)
#: What tools, locks and interrupted writes leave in an experiment, where they do, and runs that were set aside.
_OF_TOOLS_AND_LOCKS = re.compile(
    # Below runs/ an earlier vipo set runs aside.
    rf"{_TIMESTAMP}|(runs/)?\.superseded/.*"
    r"|((prompts|embeddings|configs|logs|crate|export|comparison|report(/data)?|(runs|samples|evaluation|credit)(/[^/]+(/(checkpoints|updates))?)?)/)?"
    r"\.(gitignore|lock|lock-holder\.json|[^/]+\.(partial|replaced)(/.*)?)"
)

log = logging.getLogger(__name__)


class ProvenanceError(VipoError):
    """Lineage that cannot be recorded or does not hold; the message names the stage and the file."""


@contextlib.contextmanager
def record_stage(
    stage: str,
    folder: Path,
    *,
    inputs: Sequence[Path | Mapping[str, Any]],
    outputs: Callable[[], Sequence[Path]] | Sequence[Path],
    config: Mapping[str, Any] | None,
    seeds: Sequence[int] = (),
    root: Path,
    experiment: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Write ``<folder>/provenance.json`` when the block succeeds, and nothing when it fails.

    Where the code is not a commit's, ``<folder>/provenance.diff`` holds what is beside it (see `git_state`); where
    configurations and data are of another repository, ``<folder>/provenance.checkout.diff`` does so for that one.

    Inputs and code are hashed before the block (what it read), outputs after it. An earlier success's
    record is removed before the block, so that a record always belongs to the outputs beside it.

    Args:
        stage: name of the stage (DESIGN section 2).
        folder: the stage's own folder; no other stage may record there.
        inputs: files and folders that the stage reads, or what `hashed` says of them.
        outputs: files and folders that the stage writes, or a function that lists them afterwards.
        config: what of the configuration decides the stage's result (JSON-serialisable); it is recorded with its hash.
        seeds: seeds of the stage's random draws.
        root: repository root; paths inside it are recorded relative to it.
        experiment: ``results/<experiment>``, where finished results that another configuration or other inputs made
            are set aside before the block; None where the block itself keeps what was there.

    Yields:
        What else the record shall name, by key: empty, for the block to fill.

    Raises:
        ProvenanceError: an input or output is missing, or the folder holds another stage's record.
        StorageError: the record cannot be written.
    """
    target = folder / PROVENANCE
    earlier = None
    if target.is_file():
        try:
            earlier = read_provenance(target)
        except ProvenanceError as error:
            # Running the stage again is what mends a damaged record.
            log.warning("%s", error)
        if earlier is not None and _FORMER.get(other := earlier["stage"], other) != stage:
            raise ProvenanceError(f"{target}: belongs to stage '{other}'; give stage '{stage}' a folder of its own")
    # Now, not after the inputs are hashed: the hash is that of the diff which is kept.
    git, diff = code_state()
    checkout, checkout_diff = checkout_state(root) or (git, b"")
    facts: dict[str, Any] = {}
    record: dict[str, Any] = {
        "stage": stage,
        "command": command_line(),
        "config": None if config is None else dict(config),
        "config_sha256": None if config is None else config_hash(dict(config)),
        "seeds": list(seeds),
        "inputs": hashed(stage, inputs, root),
        "git": git,
        **({"checkout": checkout} if checkout != git else {}),
        "package_sha256": package_sha256(),
        "lock_sha256": lock_sha256(),
        "installed_sha256": installed_sha256(),
        "container_digest": os.environ.get("VIPO_IMAGE_DIGEST"),
        "hardware": hardware(),
        "versions": versions(),
        "started": _now(),
    }
    replaces = experiment is not None and is_finished(folder, stage) and not _same_work(earlier, record, folder, root)
    with _made_way(experiment if replaces else None, folder), _without_record(folder, earlier, root):
        yield facts
        _finish(stage, folder, outputs, record, facts, {DIFF: diff, CHECKOUT_DIFF: checkout_diff}, root)


def hashed(stage: str, inputs: Sequence[Path | Mapping[str, Any]], root: Path) -> list[dict[str, Any]]:
    """What a record says of a stage's inputs: read once, where the stage must know them before it starts.

    Raises:
        ProvenanceError: one is missing.
    """
    missing = f"input of stage '{stage}' does not exist; run the stage that writes it first"
    return [dict(item) if isinstance(item, Mapping) else _entry(item, root, missing) for item in inputs]


def is_made(
    stage: str, folder: Path, inputs: Sequence[Mapping[str, Any]], config: Mapping[str, Any], root: Path
) -> bool:
    """Whether `folder` holds what a stage would make: by the record beside it and the bytes of what that names.

    Args:
        stage, folder, config, root: as of `record_stage`.
        inputs: as `hashed` gives them.
    """
    try:
        record = read_provenance(folder / PROVENANCE)
        wanted = {"config_sha256": config_hash(dict(config)), "inputs": inputs}
        return (
            record["stage"] == stage
            and _same_work(record, wanted, folder, root)
            and not verify_outputs(folder / PROVENANCE, root)
        )
    # No record, or one that was edited into something else: making it again mends it.
    except (ProvenanceError, LookupError, TypeError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _made_way(experiment: Path | None, folder: Path) -> Iterator[None]:
    """Set aside what is in `folder`; it comes back where the block fails before it has written anything there."""
    if experiment is None:
        yield
        return
    aside = set_aside(experiment, [folder])
    log.warning("%s: another configuration or other inputs made it; it is set aside in %s", folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if bring_back(aside, experiment, folder):
            log.warning("%s: nothing came in its place; it is back from %s", folder, aside)
        raise


@contextlib.contextmanager
def _without_record(folder: Path, earlier: Mapping[str, Any] | None, root: Path) -> Iterator[None]:
    """Take an earlier record away; it comes back where the block fails and its outputs are still as it says."""
    kept = {
        path: replaced_path(path) for name in (DIFF, CHECKOUT_DIFF, PROVENANCE) if (path := folder / name).is_file()
    }
    for path, aside in kept.items():
        path.rename(aside)
    try:
        yield
    except BaseException:
        entries = [] if earlier is None else located(earlier, folder, root)["outputs"]
        if entries and not any(True for entry in entries for _ in _differences(entry, root)):
            for path, aside in kept.items():
                if aside.is_file():
                    aside.rename(path)
        raise
    finally:
        for aside in kept.values():
            aside.unlink(missing_ok=True)


def _finish(
    stage: str,
    folder: Path,
    outputs: Callable[[], Sequence[Path]] | Sequence[Path],
    record: dict[str, Any],
    facts: Mapping[str, Any],
    diffs: Mapping[str, bytes],
    root: Path,
) -> None:
    written = outputs() if callable(outputs) else outputs
    record["ended"] = _now()
    record["outputs"] = [_entry(path, root, f"output of stage '{stage}' does not exist") for path in written]
    for name, content in diffs.items():
        if content:
            with atomic_file(folder / name) as path:
                path.write_bytes(content)
    with atomic_file(folder / PROVENANCE) as path:
        path.write_text(json.dumps(record | dict(facts), indent=1, sort_keys=True) + "\n")


def command_line() -> list[str]:
    """What the user typed, the program without its folder; in a rank that `vipo train` started, what that was given."""
    given = os.environ.get(COMMAND)
    return json.loads(given) if given else [Path(sys.argv[0]).name, *sys.argv[1:]]


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
    return all(isinstance(entries, list) for entries in lists) and all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) for entries in lists for entry in entries or ()
    )


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
    record = located(read_provenance(provenance), provenance.parent, root)
    return [problem for entry in record["outputs"] for problem in _differences(entry, root)]


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


def experiment_files(experiment_dir: Path) -> list[str]:
    """Files of an experiment, relative to it, sorted.

    Left out are what tools, locks and interrupted writes leave where they do, runs that were set aside, and what is
    made for others from finished results: a run's folder for the Hub (``export/``, with a manifest of its own) and the
    list that an upload leaves (``SHA256SUMS``).
    """
    names = (name for name in _walk(experiment_dir) if not _OF_TOOLS_AND_LOCKS.fullmatch(name))
    return [name for name in names if Path(name).parts[0] not in ("export", "SHA256SUMS")]


def _walk(folder: Path) -> list[str]:
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        place = Path(base)
        # A link to a folder that holds it has no end: it is listed itself.
        loops = [name for name in folders if place.resolve().is_relative_to((place / name).resolve())]
        folders[:] = [name for name in folders if name not in loops]
        found += [(place / name).relative_to(folder).as_posix() for name in (*files, *loops)]
    return sorted(found)


def is_unchanged(entry: Mapping[str, Any], root: Path) -> bool:
    """Whether a recorded input or output is there, byte for byte, with nothing added to its folder."""
    return next(_differences(entry, root), None) is None


def entry_files(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a recorded input or output: path (as recorded) to ``bytes`` and ``sha256``."""
    if "files" not in entry:
        return {entry["path"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]}}
    return {f"{entry['path']}/{name}": dict(file) for name, file in entry["files"].items()}


def absolute_path(path: Path) -> Path:
    """`path` from the file system's root, without ``..`` and with its links kept."""
    # Not resolved: results/ may be a link to another disk and still belongs to the repository.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _entry(path: Path, root: Path, missing: str) -> dict[str, Any]:
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


def _same_work(earlier: Mapping[str, Any] | None, record: Mapping[str, Any], folder: Path, root: Path) -> bool:
    """Whether a record names the configuration and the inputs of another; what came without one may be anything."""
    if earlier is None or earlier.get("config_sha256") != record["config_sha256"]:
        return False
    before, now = (
        [(entry["path"], entry["sha256"]) for entry in inputs]
        for inputs in (located(earlier, folder, root)["inputs"], record["inputs"])
    )
    return before == now


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _folder_files(folder: Path) -> list[str]:
    visible = (name for name in _walk(folder) if not any(part.startswith(".") for part in Path(name).parts))
    # What tells how a folder was made is no part of what was made: another day's would be another generator.
    return [name for name in visible if (folder / name).is_file() and name not in (PROVENANCE, DIFF, CHECKOUT_DIFF)]


def _recorded_path(path: Path, root: Path) -> str:
    absolute, base = absolute_path(path), absolute_path(root)
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else absolute.as_posix()


def _differences(entry: Mapping[str, Any], root: Path) -> Iterator[str]:
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
