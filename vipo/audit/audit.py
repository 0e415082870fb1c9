"""The audit of one experiment: every check, and the verdict."""

from pathlib import Path

from vipo.audit.anchors import check_crate, check_exports, check_lock
from vipo.audit.configurations import check_configurations
from vipo.audit.examination import Examination, irregular_files, printable
from vipo.audit.findings import Anchor, Audit, Checked
from vipo.audit.lineage import check_code, check_lineage, read_records
from vipo.audit.numbers import check_numbers
from vipo.audit.processes import check_processes
from vipo.audit.rerun import rerun_stage
from vipo.errors import VipoError


class AuditError(VipoError):
    """There is nothing to audit, or the keys to check a signature with are not there; the message says what to give."""


def audit_experiment(
    folder: Path, root: Path, *, allowed_signers: Path | None = None, rerun: str | None = None
) -> Audit:
    """Check an experiment's results from their bytes to the roots of their lineage.

    Args:
        folder: ``results/<experiment>``, or an unpacked crate.
        root: repository root: its git history holds the code, the committed ``dvc.lock`` and the inputs.
        allowed_signers: keys that a signature of the crate is trusted by (ssh-keygen's ALLOWED SIGNERS); without it
            a signature is no anchor.
        rerun: folder of a stage (``runs/vipo-s0``) that is run again in a temporary place and compared by bytes.

    Returns:
        Verdict and findings. A damaged file is a finding, never an exception.

    Raises:
        AuditError: `folder` holds no results, or `allowed_signers` is missing.
        ProvenanceError: `rerun` names no stage.
    """
    if allowed_signers is not None and not allowed_signers.is_file():
        raise AuditError(f"{allowed_signers}: missing; name a file of principals and public keys (man ssh-keygen)")
    examination = Examination(folder, root)
    if not examination.stages():
        raise AuditError(f"{folder}: holds no results of a stage; name an experiment's folder, such as results/demo")
    # Whoever reads one waits without end, or until the memory is full.
    special = irregular_files(examination.folder)
    for name in special:
        examination.broken(
            name, "unknown file", "is no regular file but a pipe, a socket or a device; nothing else was examined",
            "delete it, or restore the file that it stands for, and audit again",
        )  # fmt: skip
    anchors, configurations = ([], 0) if special else _examine(examination, allowed_signers, rerun)
    if not special and not any(anchors):
        examination.remark(
            folder.as_posix(), "anchor",
            "consistent, not anchored: whoever changed a result and the hashes beside it would not be noticed"
            if not any(finding.severity == "broken" for finding in examination.findings)
            else "not anchored",
            "commit dvc.lock after the run, or sign the crate ('vipo crate --sign KEY') and audit with "
            "--allowed-signers",
        )  # fmt: skip
    files, size = examination.hashed()
    severities = {finding.severity for finding in examination.findings}
    return Audit(
        path=folder.as_posix(),
        verdict="broken" if "broken" in severities else "with remarks" if severities else "reproducible",
        anchors=tuple(anchor for anchor in anchors if anchor is not None),
        checked=Checked(
            files=files,
            bytes=size,
            stages=len(examination.stages()),
            configurations=configurations,
            numbers=examination.numbers,
            unanchored=tuple(printable(name) for name in examination.files if not examination.is_anchored(name)),
            outside=tuple(map(printable, examination.outside)),
            reran=None if special else rerun,
        ),
        findings=tuple(examination.findings),
    )


def _examine(
    examination: Examination, allowed_signers: Path | None, rerun: str | None
) -> tuple[list[Anchor | None], int]:
    """All checks, in their order: the anchors, and how many configurations there were."""
    crate = check_crate(examination, allowed_signers)
    lock, locked = check_lock(examination)
    check_exports(examination)
    read_records(examination, locked)
    configurations = check_configurations(examination, locked)
    check_lineage(examination)
    check_processes(examination)
    check_code(examination)
    check_numbers(examination)
    if rerun is not None:
        rerun_stage(examination, rerun)
    return [crate, lock], configurations
