"""Finished results make way whole: moved below ``<experiment>/.superseded``, never deleted.

Snakemake deletes the declared outputs of a job before the job starts. What that would take is asked about first
(`make_way`); stages that are started by hand or by DVC set aside what another configuration or other inputs made.
"""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vipo.errors import VipoError
from vipo.provenance.files import named_write_errors
from vipo.provenance.locks import run_lock

SUPERSEDED = ".superseded"

#: Stages whose results nobody replaces unasked: their folder, and what of it says that the stage has finished.
_RESULTS: Mapping[str, tuple[str, str]] = {
    "prepare": ("prompts", "manifest.json"),
    "encode": ("embeddings", "eval.safetensors"),
    "train": ("runs", "weights"),
    "sample": ("samples", "samples.json"),
    "score": ("evaluation", "scores.parquet"),
    "credit": ("credit", "credit.json"),
}
#: Stays where it is: locks, and the parts of a measurement or of a stage's work, each under the hash of what it is of.
_STAYING = re.compile(r"\.lock.*|\..+\.partial")
#: Stages that show results, in seconds: set aside without asking.
_VIEWS: Mapping[str, tuple[str, ...]] = {
    "compare": ("comparison/*",),
    "summarize": ("report/data/*",),
    "report": ("report/index.html", "report/thumbs", "report/time.*", "report/provenance.*"),
    "crate": ("crate/*", "ro-crate-metadata.json*"),
}
_SHOWN = 6


class WouldReplace(VipoError):
    """Finished results would be replaced; the message lists them and says how to go on."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that a workflow is about to start, having deleted its outputs.

    Attributes:
        stage: name of the stage.
        run: ``<arm>-s<seed>``, of a measurement the checkpoint's label; None where the stage serves all runs.
        cause: why it is planned; empty where it follows from other jobs.
        incomplete: whether the workflow saw no end of an earlier try of this job: what that left is no finished result,
            unless it was finished without the workflow, by a configuration that is another one now.
        identity: what of the configuration decides its results, as JSON; None where nothing does.
    """

    stage: str
    run: str | None = None
    cause: str = ""
    incomplete: bool = False
    identity: str | None = None

    @property
    def folder(self) -> str:
        """The folder that its stage writes, relative to the experiment's."""
        place = _RESULTS[self.stage][0]
        return place if self.run is None else f"{place}/{self.run}"


def finished_among(experiment: Path, planned: Iterable[PlannedJob]) -> list[PlannedJob]:
    """The planned jobs that would replace the finished results of a stage, in the order of stages and runs."""
    found = [
        job
        for job in planned
        if job.stage in _RESULTS
        and is_finished(experiment / job.folder, job.stage)
        and not (job.incomplete and _cut_off(experiment / job.folder, job.identity))
    ]
    return sorted(found, key=lambda job: (list(_RESULTS).index(job.stage), job.run or ""))


def is_finished(folder: Path, stage: str) -> bool:
    """Whether `folder` holds finished results of a stage; False for a stage that only shows results."""
    return stage in _RESULTS and (folder / _RESULTS[stage][1]).exists()


def _cut_off(folder: Path, identity: str | None) -> bool:
    """Whether what an unfinished job left lacks the record of its end, or is what the next try would make as well."""
    try:
        config = json.loads((folder / "provenance.json").read_text())["config"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True
    return identity is None or config == json.loads(identity)


def make_way(experiment: Path, planned: Sequence[PlannedJob], *, consent: bool, how: str) -> Path | None:
    """Before a workflow deletes outputs: set aside what is finished, or stop where nobody agreed to that.

    Report and crate show results and are set aside unasked.

    Args:
        experiment: ``results/<experiment>``.
        planned: all jobs that the workflow is about to start.
        consent: whether finished results may be set aside.
        how: for the message, how to consent.

    Returns:
        The folder that they were moved into; None where nothing had to move.

    Raises:
        WouldReplace: results are finished and `consent` is False; nothing was touched.
        RunLocked: a process writes one of them; nothing was moved.
        StorageError: the disk refused a move; what was moved is in `SUPERSEDED`.
    """
    at_stake = finished_among(experiment, planned)
    if at_stake and not consent:
        raise WouldReplace(_question(experiment, at_stake, how))
    folders = [experiment / job.folder for job in at_stake]
    logs = [path for job in at_stake for path in _logs(experiment, job)]
    patterns = [pattern for job in planned if not job.incomplete for pattern in _VIEWS.get(job.stage, ())]
    found = (path for pattern in patterns for path in sorted(experiment.glob(pattern)))
    views = [path for path in found if not path.name.startswith(".")]
    if not folders and not views:
        return None
    with contextlib.ExitStack() as locked:
        # Nobody else may write what is moved. The page's stages share a lock, and so do the crate's files.
        for folder in [*folders, *(experiment / name for name in ("report", "crate") if (experiment / name).is_dir())]:
            locked.enter_context(run_lock(folder))
        return set_aside(experiment, [*logs, *views, *folders])


def set_aside(experiment: Path, paths: Sequence[Path]) -> Path:
    """Move files and folders of an experiment below its `SUPERSEDED`, each to the same place there.

    A folder's lock stays, and so does work in parts. What tells that a folder is finished, or was begun, moves last: a
    process that is killed in between leaves something to be found and set aside again.

    Args:
        experiment: ``results/<experiment>``.
        paths: below it; whoever calls holds the locks of the folders.

    Returns:
        The new folder that holds them.

    Raises:
        StorageError: the disk refused a move.
    """
    with named_write_errors(experiment / SUPERSEDED):
        aside = _new_folder(experiment / SUPERSEDED)
        for path in paths:
            target = aside / path.relative_to(experiment)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                shutil.move(path, target)
                continue
            target.mkdir(exist_ok=True)
            for child in sorted(path.iterdir(), key=_lateness):
                if not _STAYING.fullmatch(child.name):
                    shutil.move(child, target / child.name)
            if not any(path.iterdir()):
                path.rmdir()
    return aside


def bring_back(aside: Path, experiment: Path, folder: Path) -> bool:
    """Undo a `set_aside` of `folder` alone, unless something has been written in its place since; True if undone.

    Raises:
        StorageError: the disk refused a move.
    """
    if any(not child.name.startswith(".") for child in folder.iterdir()):
        return False
    with named_write_errors(folder):
        held = aside / folder.relative_to(experiment)
        for child in sorted(held.iterdir(), key=_lateness):
            shutil.move(child, folder / child.name)
        shutil.rmtree(aside)
    return True


def _lateness(child: Path) -> tuple[bool, bool, str]:
    marks = {mark for _, mark in _RESULTS.values()}
    return child.name == "checkpoints", child.name in marks, child.name


def _new_folder(parent: Path) -> Path:
    parent.mkdir(exist_ok=True)
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in itertools.count(1):
        folder = parent / (moment if number == 1 else f"{moment}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("unreachable")


def _logs(experiment: Path, job: PlannedJob) -> list[Path]:
    # The workflow deletes them with the outputs.
    name = job.stage if job.run is None else f"{job.stage}-{job.run}"
    path = experiment / "logs" / f"{name}.log"
    return [path] if path.is_file() else []


def _question(experiment: Path, at_stake: Sequence[PlannedJob], how: str) -> str:
    places: dict[str, list[PlannedJob]] = {}
    for job in at_stake:
        places.setdefault(_RESULTS[job.stage][0], []).append(job)
    lines = [f"  {place}: {_listed(jobs)}" for place, jobs in places.items()]
    return "\n".join(
        [
            f"{experiment}: finished results would be replaced, so nothing was started and nothing was touched:",
            *lines,
            "To keep them where they are, give what is new a name of its own: overrides='[..., experiment.name=NAME]'.",
            f"to go on under this name: {how} (which moves them whole into {experiment / SUPERSEDED})",
        ]
    )


def _listed(jobs: Sequence[PlannedJob]) -> str:
    told = [
        (job.cause or "follows from the others") if job.run is None else f"{job.run} ({job.cause})".removesuffix(" ()")
        for job in jobs
    ]
    more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return ", ".join(told[:_SHOWN]) + more
