"""What all checks of an audit share: the experiment's files and their hashes, its stages, and the findings."""

import contextlib
import hashlib
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vipo.audit.findings import Check, Finding, Severity
from vipo.config.run import Config
from vipo.errors import VipoError
from vipo.provenance.commits import commit_file
from vipo.provenance.environment import package_sha256_at
from vipo.provenance.files import file_sha256
from vipo.provenance.git import MissingObject
from vipo.provenance.records import absolute_path, experiment_files, files_below
from vipo.text import one_line

#: The stage that records in a folder of the experiment, by a pattern of the folder's path.
_STAGES = {
    r"prompts": "prepare",
    r"embeddings": "encode",
    r"runs/[^/]+": "train",
    r"samples/[^/]+": "sample",
    r"evaluation/[^/]+": "score",
    r"credit/[^/]+": "credit",
    r"comparison": "compare",
    r"report/data": "summarize",
    r"report": "report",
}
#: Files beside the results that no equality is claimed for; a signature fixes them, dvc.lock does not.
VOLATILE = re.compile(
    r"(prompts|embeddings|comparison|report|report/data|(runs|samples|evaluation|credit)/[^/]+)/provenance\.(json|diff|checkout\.diff)"
    r"|runs/[^/]+/(timing\.jsonl|(tb|sheets|trackers|checkpoints)/.+)|report/(index\.html|time\.(json|csv|svg)|thumbs/[^/]+)|live\.html"
    r"|configs/[^/]+\.yaml|logs/.+|crate/.+|ro-crate-metadata\.json(\.sig)?"
)
#: A checkpoint's folder, and a file in it; its ``manifest.json`` names the hashes of the others.
CHECKPOINT = re.compile(r"(runs/[^/]+/checkpoints/[^/]+)/(.+)")


class Examination:
    """One experiment under audit. Files are named by their path in its folder, all others by their recorded path."""

    def __init__(self, folder: Path, root: Path) -> None:
        """List the files of `folder`, an experiment's, of the repository at `root`."""
        self.folder = absolute_path(folder)
        self.root = absolute_path(root)
        self.files = experiment_files(self.folder)
        self.findings: list[Finding] = []
        #: Records that could be read, by their stage's folder.
        self.records: dict[str, Mapping[str, Any]] = {}
        #: What each run was evaluated with, or else trained with.
        self.configs: dict[str, Config] = {}
        #: What each run was trained with.
        self.trained: dict[str, Config] = {}
        #: What the report's numbers were made with.
        self.reported: Config | None = None
        #: Files and folders whose bytes an anchor fixes.
        self.anchored: set[str] = set()
        #: Files that the crate's metadata names.
        self.described: set[str] = set()
        #: Checkpoints whose content a crate does not hold by design.
        self.outside: list[str] = []
        self.numbers = 0
        self._hashes: dict[Path, str] = {}
        self._commits: dict[str, Mapping[str, str | None]] = {}

    def stages(self) -> dict[str, str]:
        """Folders that hold a stage's files, and the name of the stage."""
        return dict(sorted(place for place in map(stage_of, self.files) if place is not None))

    def is_anchored(self, name: str) -> bool:
        """Whether an anchor fixes the bytes of a file, itself or with its folder."""
        return any(name == anchored or name.startswith(f"{anchored}/") for anchored in self.anchored)

    def sha256(self, path: Path) -> str | None:
        """Of a file, read once; None where there is none, or none that can be read."""
        if path not in self._hashes and path.is_file():
            try:
                self._hashes[path] = file_sha256(path)
            except OSError as error:
                name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
                self.broken(name.as_posix(), "bytes", f"cannot be read ({error})", "make it readable, or restore it")
        return self._hashes.get(path)

    def held(self, commit: str) -> Mapping[str, str | None]:
        """SHA-256 of the ``package`` and the ``lock`` that a commit of the repository holds; None for one it lacks.

        Raises:
            ForgedObject: the repository was tampered with.
        """
        if commit not in self._commits:
            package = lock = None
            # A shallow or partial clone cannot tell.
            with contextlib.suppress(MissingObject):
                package = package_sha256_at(self.root, commit)
                lock = commit_file(self.root, commit, "requirements.lock")
            self._commits[commit] = {
                "package": package,
                "lock": None if lock is None else hashlib.sha256(lock).hexdigest(),
            }
        return self._commits[commit]

    def hashed(self) -> tuple[int, int]:
        """Number and bytes of the experiment's files that were hashed."""
        paths = [path for path in self._hashes if path.is_relative_to(self.folder)]
        return len(paths), sum(path.stat().st_size for path in paths)

    def broken(self, artifact: str, check: Check, message: str, advice: str) -> None:
        """The results do not hold together."""
        self._add("broken", artifact, check, message, advice)

    def remark(self, artifact: str, check: Check, message: str, advice: str) -> None:
        """The results hold together, but whoever relies on them must know this."""
        self._add("remark", artifact, check, message, advice)

    def _add(self, severity: Severity, artifact: str, check: Check, message: str, advice: str) -> None:
        finding = Finding(
            severity=severity,
            artifact=printable(artifact),
            check=check,
            message=printable(message),
            advice=printable(advice),
        )
        if finding not in self.findings:
            self.findings.append(finding)

    @contextlib.contextmanager
    def guarded(
        self, artifact: str, check: Check, remedy: str = "restore it, or run the stage that writes it again"
    ) -> Iterator[None]:
        """Whatever a damaged file does to the reader in the block becomes a finding."""
        try:
            yield
        # A file that was tampered with can make its reader fail in any way.
        except Exception as error:
            told = "; ".join(str(error).splitlines())
            reason = told if isinstance(error, VipoError) else f"{type(error).__name__}: {told}"
            self.broken(artifact, check, f"cannot be examined ({reason})", remedy)


def printable(text: str) -> str:
    """A text with names of files in it, which may be no UTF-8 and no names: in one line, as it can be printed."""
    return one_line(text, limit=4000)


def irregular_files(folder: Path) -> list[str]:
    """Pipes, sockets and devices below a folder, also those that links lead to, relative to it, sorted."""
    found = []
    for name in files_below(folder):
        # What a link that leads nowhere is, the checks tell.
        with contextlib.suppress(OSError):
            mode = (folder / name).stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                found.append(name)
    return found


def stage_of(name: str) -> tuple[str, str] | None:
    """The folder of the stage that a file of an experiment belongs to, and the stage; None outside of all."""
    # The innermost: the report's numbers lie in the folder of its page.
    for folder in map(Path.as_posix, Path(name).parents):
        for pattern, stage in _STAGES.items():
            if re.fullmatch(pattern, folder):
                return folder, stage
    return None


def short(value: str) -> str:
    """A hash as people compare it."""
    return f"{value[:12]}…"
