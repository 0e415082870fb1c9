"""What each stage read, wrote and ran on: recorded once, when the stage succeeds, by `record_stage`."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vipo.config.values import config_hash
from vipo.provenance.environment import (
    checkout_state,
    code_state,
    hardware,
    installed_sha256,
    lock_sha256,
    package_sha256,
    versions,
)
from vipo.provenance.files import atomic_file, replaced_path
from vipo.provenance.records import (
    CHECKOUT_DIFF,
    DIFF,
    PROCESSES,
    PROVENANCE,
    ProvenanceError,
    differences,
    entry_of,
    located,
    read_provenance,
    verify_outputs,
)
from vipo.provenance.superseded import bring_back, is_finished, set_aside

#: Stages of earlier versions, and the one that writes their folder now.
_FORMER: Mapping[str, str] = {"evaluate": "score"}
#: In the environment of a launcher's ranks: the command that it was given, as JSON.
COMMAND = "VIPO_COMMAND"

log = logging.getLogger(__name__)


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
    processes: Mapping[str, Any] | None = None,
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
        processes: what rewards that compute elsewhere tell of themselves, by label; with others, it is other work.

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
        **({PROCESSES: dict(processes)} if processes else {}),
        "git": git,
        **({"checkout": checkout} if checkout != git else {}),
        "package_sha256": package_sha256(),
        "lock_sha256": lock_sha256(),
        "installed_sha256": installed_sha256(),
        "container_digest": os.environ.get("VIPO_IMAGE_DIGEST"),
        # The digest is then that of the file, not of an image in a registry.
        **({"container_file": file} if (file := os.environ.get("VIPO_IMAGE_FILE")) else {}),
        "hardware": hardware(),
        "versions": versions(),
        "started": _now(),
    }
    replaces = experiment is not None and is_finished(folder, stage) and not _same_work(earlier, record)
    with _made_way(experiment if replaces else None, folder), _without_record(folder, earlier, root):
        yield facts
        _finish(stage, folder, outputs, record, facts, {DIFF: diff, CHECKOUT_DIFF: checkout_diff}, root)


def hashed(stage: str, inputs: Sequence[Path | Mapping[str, Any]], root: Path) -> list[dict[str, Any]]:
    """What a record says of a stage's inputs: read once, where the stage must know them before it starts.

    Raises:
        ProvenanceError: one is missing.
    """
    missing = f"input of stage '{stage}' does not exist; run the stage that writes it first"
    return [dict(item) if isinstance(item, Mapping) else entry_of(item, root, missing) for item in inputs]


def is_made(
    stage: str,
    folder: Path,
    inputs: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    root: Path,
    processes: Mapping[str, Any] | None = None,
) -> bool:
    """Whether `folder` holds what a stage would make: by the record beside it and the bytes of what that names.

    Args:
        stage, folder, config, root, processes: as of `record_stage`.
        inputs: as `hashed` gives them.
    """
    try:
        record = read_provenance(folder / PROVENANCE)
        wanted = {"config_sha256": config_hash(dict(config)), "inputs": inputs, PROCESSES: processes or {}}
        return record["stage"] == stage and _same_work(record, wanted) and not verify_outputs(folder / PROVENANCE, root)
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
    log.warning(
        "%s: another configuration, other inputs or another reward process made it; it is set aside in %s",
        folder,
        aside,
    )
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
        if entries and not any(True for entry in entries for _ in differences(entry, root)):
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
    record["outputs"] = [entry_of(path, root, f"output of stage '{stage}' does not exist") for path in written]
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


def _same_work(earlier: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
    """Whether a record names the configuration, the inputs and the reward processes of another; what came without one
    may be anything.

    An input is its bytes and its place among the others: where it lies, the configuration says, or a cache decides.
    """
    if earlier is None or earlier.get("config_sha256") != record["config_sha256"]:
        return False
    if earlier.get(PROCESSES, {}) != record.get(PROCESSES, {}):
        return False
    before, now = ([entry["sha256"] for entry in each["inputs"]] for each in (earlier, record))
    return before == now


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
