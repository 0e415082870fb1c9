"""What all checks of an audit share: the experiment's files and their hashes, its stages, and the findings."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vipo.audit.findings import Check, Finding, Severity
from vipo.config.models import Config
from vipo.errors import VipoError
from vipo.provenance.files import file_sha256
from vipo.provenance.lineage import absolute_path, experiment_files

#: The stage that records in a folder of the experiment, by a pattern of the folder's path.
_STAGES = {
    r"prompts": "prepare",
    r"embeddings": "encode",
    r"runs/[^/]+": "train",
    r"evaluation/[^/]+": "evaluate",
    r"report/data": "summarize",
    r"report": "report",
}
#: Files beside the results that no equality is claimed for; a signature fixes them, dvc.lock does not.
VOLATILE = re.compile(
    r"(prompts|embeddings|report|report/data|runs/[^/]+|evaluation/[^/]+)/provenance\.(json|diff|checkout\.diff)"
    r"|runs/[^/]+/(timing\.jsonl|tb/[^/]+|checkpoints/.+)|report/(index\.html|time\.(json|csv|svg))"
    r"|configs/[^/]+\.yaml|logs/.+|crate/.+|ro-crate-metadata\.json(\.sig)?"
)


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
        self.numbers = 0
        self._hashes: dict[Path, str] = {}

    def stages(self) -> dict[str, str]:
        """Folders that hold a stage's files, and the name of the stage."""
        found = {}
        for name in self.files:
            # The innermost: the report's numbers lie in the folder of its page.
            for folder in map(Path.as_posix, Path(name).parents):
                stage = next((stage for pattern, stage in _STAGES.items() if re.fullmatch(pattern, folder)), None)
                if stage is not None:
                    found[folder] = stage
                    break
        return dict(sorted(found.items()))

    def is_anchored(self, name: str) -> bool:
        """Whether an anchor fixes the bytes of a file, itself or with its folder."""
        return any(name == anchored or name.startswith(f"{anchored}/") for anchored in self.anchored)

    def sha256(self, path: Path) -> str | None:
        """Of a file, read once; None where there is none."""
        if path not in self._hashes and path.is_file():
            self._hashes[path] = file_sha256(path)
        return self._hashes.get(path)

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
        finding = Finding(severity=severity, artifact=artifact, check=check, message=message, advice=advice)
        if finding not in self.findings:
            self.findings.append(finding)

    @contextlib.contextmanager
    def guarded(self, artifact: str, check: Check) -> Iterator[None]:
        """Whatever a damaged file does to the reader in the block becomes a finding."""
        try:
            yield
        # A file that was tampered with can make its reader fail in any way.
        except Exception as error:
            reason = str(error) if isinstance(error, VipoError) else f"{type(error).__name__}: {error}"
            self.broken(
                artifact, check, f"cannot be examined ({reason})", "restore it, or run the stage that writes it again"
            )


def short(value: str) -> str:
    """A hash as people compare it."""
    return f"{value[:12]}…"
