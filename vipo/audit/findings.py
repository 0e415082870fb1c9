"""What an audit says: findings and the verdict, for machines (`Audit` is the schema of ``--json``) and for people."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vipo.text import one_line

Severity = Literal["broken", "remark"]
Verdict = Literal["reproducible", "with remarks", "broken"]

#: What was looked at; every finding names one.
Check = Literal[
    "anchor", "bytes", "unknown file", "lineage", "code", "environment", "configuration", "numbers", "rerun"
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Finding(_Model):
    """One thing that is not as it should be, or that a reader must know."""

    severity: Severity = Field(description="broken: the results do not hold together. remark: they do, but read this.")
    artifact: str = Field(description="Path in the experiment's folder, or of the repository (`dvc.lock`, `data/…`).")
    check: Check
    message: str = Field(description="What was found.")
    advice: str = Field(description="What to do about it.")


class Anchor(_Model):
    """What the results' hashes hang on, so that nobody can change results and hashes together unseen."""

    kind: Literal["dvc.lock", "signature"]
    by: str = Field(description="The commit that holds dvc.lock, or the signer's principal.")
    covers: int = Field(description="Number of files or folders whose bytes it fixes.")


class Checked(_Model):
    """How much was looked at."""

    files: int = Field(description="Files of the experiment that were hashed.")
    bytes: int
    stages: int = Field(description="Stages whose lineage was followed.")
    configurations: int
    numbers: int = Field(description="Numbers that were computed again and compared.")
    unanchored: tuple[str, ...] = Field(
        description="Files that no anchor fixes; they are checked against each other alone, so that whoever changes "
        "all of them is not noticed."
    )
    outside: tuple[str, ...] = Field(
        description="Checkpoints that a crate names by their manifest and does not hold: by design, and no finding."
    )
    reran: str | None = Field(description="Folder of the stage that was run again.")


class Audit(_Model):
    """The whole result of an audit."""

    version: Literal[1] = 1
    path: str
    verdict: Verdict
    anchors: tuple[Anchor, ...]
    checked: Checked
    findings: tuple[Finding, ...]

    def text(self) -> str:
        """The verdict and every finding in words, findings grouped by artifact, what is broken first."""
        lines = [f"{one_line(self.path)}: {self.verdict}"]
        for anchor in self.anchors:
            where = f"dvc.lock of commit {anchor.by[:12]}" if anchor.kind == "dvc.lock" else f"signed by {anchor.by}"
            lines.append(f"anchored: {where}, {anchor.covers} files and folders")
        counts = self.checked
        if not self.anchors:
            lines.append("not anchored")
        elif counts.unanchored:
            more = ", …" if len(counts.unanchored) > 2 else ""
            beside = f"{len(counts.unanchored)} files ({', '.join(counts.unanchored[:2])}{more})"
            lines.append(f"not anchored: {beside}; --json names them all, a signed crate fixes them")
        lines.append(
            f"checked: {counts.files} files ({counts.bytes / 2**20:.1f} MiB), {counts.stages} stages, "
            f"{counts.configurations} configurations, {counts.numbers} numbers computed again"
            + (f", {counts.reran} run again" if counts.reran else "")
        )
        if counts.outside:
            lines.append(
                f"outside of a crate by design: the content of {len(counts.outside)} checkpoints "
                f"({counts.outside[0]}{', …' if len(counts.outside) > 1 else ''}), which only a resume reads"
            )
        for severity in ("broken", "remark"):
            for artifacts, group in _grouped(finding for finding in self.findings if finding.severity == severity):
                lines += ["", f"{severity.upper()}  {artifacts}"]
                lines += [f"  {finding.check}: {finding.message}\n    -> {finding.advice}" for finding in group]
        return "\n".join(lines)


def _grouped(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    """Findings by artifact; artifacts about which the same is said share a group."""
    by_artifact: dict[str, list[Finding]] = {}
    for finding in findings:
        by_artifact.setdefault(finding.artifact, []).append(finding)
    same: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for artifact, group in by_artifact.items():
        same.setdefault(tuple((finding.message, finding.advice) for finding in group), []).append(artifact)
    return [(", ".join(artifacts), by_artifact[artifacts[0]]) for artifacts in same.values()]
