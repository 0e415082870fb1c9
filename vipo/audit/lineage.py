"""The records of all stages: what each wrote and read, back to what no stage wrote, and the code that did it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vipo.audit.examination import CHECKPOINT, VOLATILE, Examination, short, stage_of
from vipo.provenance.commits import commit_file, has_commit, is_whole
from vipo.provenance.dvc import LockedStage
from vipo.provenance.environment import package_sha256, versions
from vipo.provenance.git import MissingObject, find_repository
from vipo.provenance.records import CHECKOUT_DIFF, DIFF, PROVENANCE, entry_files, read_provenance, recorded_prefix

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: What every record names.
_RECORDED = frozenset(
    (
        "stage",
        "command",
        "config",
        "config_sha256",
        "seeds",
        "inputs",
        "outputs",
        "git",
        "package_sha256",
        "lock_sha256",
        "container_digest",
        "hardware",
        "versions",
        "started",
        "ended",
    )
)
_AGAIN = "restore it, or run the stage that writes it again and all that follow"


def read_records(examination: Examination, locked: Sequence[LockedStage]) -> None:
    """Read every stage's record; say where the lineage is ``dvc.lock``'s, or none."""
    for folder, stage in examination.stages().items():
        name = f"{folder}/{PROVENANCE}"
        if name in examination.files:
            with examination.guarded(name, "lineage"):
                record = read_provenance(examination.folder / name)
                if missing := _RECORDED - record.keys():
                    message = f"lacks {', '.join(sorted(missing))}: edited, or written by an earlier vipo"
                    examination.broken(name, "lineage", message, _AGAIN)
                    continue
                if record["stage"] != stage:
                    examination.broken(name, "lineage", f"is of stage '{record['stage']}', not '{stage}'", _AGAIN)
                    continue
                commits = [record[key]["commit"] for key in ("git", "checkout") if key in record]
                if wrong := [commit for commit in commits if commit is not None and not _COMMIT.fullmatch(commit)]:
                    examination.broken(name, "lineage", f"names {wrong[0]!r} as its commit, which is none", _AGAIN)
                    continue
                examination.records[folder] = record
        elif any(_writes(out, folder) for step in locked for out in step.outs):
            examination.remark(
                folder, "lineage", f"holds no {PROVENANCE}: its lineage is what dvc.lock says of it",
                "commit, environment and hardware are with whoever ran it, and in the signed crate",
            )  # fmt: skip
        else:
            examination.broken(
                folder, "lineage", f"holds no {PROVENANCE}: stage '{stage}' did not finish, or its record was deleted",
                "run the stage again",
            )  # fmt: skip


def _writes(out: str, folder: str) -> bool:
    """Whether an output of ``dvc.lock`` is one of this stage's folder, and not of a stage's inside it."""
    _, found, rest = f"/{out}/".partition(f"/{folder}/")
    place = stage_of(f"{folder}/{rest}file")
    return bool(found) and place is not None and place[0] == folder


def check_lineage(examination: Examination) -> None:
    """Every recorded output is there with its bytes; every input is an output's bytes, or there, or in git."""
    written: dict[str, str] = {}
    for folder, record in examination.records.items():
        name = f"{folder}/{PROVENANCE}"
        with examination.guarded(name, "lineage"):
            prefix = recorded_prefix(record, folder)
            for recorded in record["outputs"]:
                for path, file in entry_files(recorded).items():
                    output = path.removeprefix(prefix)
                    if not output.startswith(f"{folder}/"):
                        examination.broken(name, "lineage", f"claims {path}, which is not its stage's", _AGAIN)
                        continue
                    written[output] = file["sha256"]
                    _check_output(examination, output, file["sha256"])
    for folder, record in examination.records.items():
        with examination.guarded(f"{folder}/{PROVENANCE}", "lineage"):
            prefix = recorded_prefix(record, folder)
            for recorded in record["inputs"]:
                for path, file in entry_files(recorded).items():
                    if path.startswith(prefix):
                        _check_input(examination, folder, path.removeprefix(prefix), file["sha256"], written)
                    else:
                        _check_root(examination, folder, record, path, file["sha256"])
    _check_unknown(examination, written)
    _check_checkpoints(examination)


def _check_output(examination: Examination, name: str, sha256: str) -> None:
    found = examination.sha256(examination.folder / name)
    if found is None:
        examination.broken(name, "bytes", "missing, its stage recorded it", _AGAIN)
    elif found != sha256:
        examination.broken(
            name, "bytes", f"changed: SHA-256 {short(found)}, its stage recorded {short(sha256)}", _AGAIN
        )


def _check_input(examination: Examination, folder: str, name: str, sha256: str, written: Mapping[str, str]) -> None:
    """An input in the experiment's folder."""
    if name in written:
        if written[name] != sha256:
            message = f"read {name} with SHA-256 {short(sha256)}, its stage wrote {short(written[name])}"
            examination.broken(folder, "lineage", message, "run this stage again")
    elif (found := examination.sha256(examination.folder / name)) is None:
        # Times and records of a run stay with whoever ran it, when results are fetched by DVC.
        report = examination.remark if VOLATILE.fullmatch(name) else examination.broken
        report(name, "bytes", f"missing, {folder} read it", _AGAIN)
    elif found != sha256:
        message = f"is not what {folder} read: SHA-256 {short(found)}, recorded {short(sha256)}"
        # A configuration may differ in what decides nothing; what decides is compared by sections.
        report = examination.remark if name.startswith("configs/") else examination.broken
        report(name, "lineage", message, f"run the stage of {folder} again")


def _check_root(examination: Examination, folder: str, record: Mapping[str, Any], path: str, sha256: str) -> None:
    """An input that no stage wrote."""
    found = examination.sha256(examination.root / path)
    if found == sha256:
        return
    state = "is not here" if found is None else f"is not what {folder} read (SHA-256 {short(sha256)})"
    if Path(path).is_absolute():
        report = examination.remark if found is None else examination.broken
        report(path, "lineage", f"{state}; it lies outside the repository", "keep what results depend on in it")
        return
    commit = record.get("checkout", record["git"])["commit"]
    try:
        held = None if commit is None else commit_file(examination.root, commit, path)
    except MissingObject as error:
        examination.remark(path, "lineage", f"{state}; {error}", "fetch the whole history, and audit again")
        return
    if held is not None and hashlib.sha256(held).hexdigest() == sha256:
        message = f"{state}; commit {commit[:12]} holds those bytes"
        examination.remark(path, "lineage", message, f"'git checkout {commit[:12]}' before you run {folder} again")
    else:
        message = f"{state}, and the commit that it ran on does not hold those bytes"
        examination.broken(path, "lineage", message, "restore it, or run the experiment again")


def _check_unknown(examination: Examination, written: Mapping[str, str]) -> None:
    for name in examination.files:
        if VOLATILE.fullmatch(name) or examination.is_anchored(name):
            continue
        # A record is no anchor: where there is one, what counts is what it names.
        if examination.anchored:
            examination.broken(
                name, "unknown file", "no anchor names it: added after the results were committed or signed",
                "remove it, or anchor the results again",
            )  # fmt: skip
        elif name not in written:
            examination.remark(name, "unknown file", "no stage wrote it", "remove it")


def _check_checkpoints(examination: Examination) -> None:
    found = [match for name in examination.files if (match := CHECKPOINT.fullmatch(name))]
    # A crate names checkpoints by their manifests and holds the content of none.
    unpacked = all(match[2] == "manifest.json" for match in found)
    for folder in dict.fromkeys(match[1] for match in found):
        with examination.guarded(folder, "bytes"):
            hashes = json.loads((examination.folder / folder / "manifest.json").read_text("utf-8"))
            files = {match[2] for match in found if match[1] == folder} - {"manifest.json"}
            if not files and unpacked and f"{folder}/manifest.json" in examination.described:
                examination.outside.append(folder)
                continue
            if not files:
                examination.remark(
                    folder, "bytes", "its content is not here: no run can resume from it",
                    "restore it; or delete its folder, the results do not need it",
                )  # fmt: skip
                continue
            for name in sorted(files | hashes.keys()):
                if examination.sha256(examination.folder / folder / name) != hashes.get(name):
                    examination.broken(
                        f"{folder}/{name}", "bytes", "missing or not as its manifest says: no run can resume from it",
                        "delete this checkpoint's folder; the results do not need it",
                    )  # fmt: skip


def check_code(examination: Examination) -> None:
    """The commit of every stage exists and was clean; package, lock and libraries are the present ones."""
    present = {"package": package_sha256(), "lock": examination.sha256(examination.root / "requirements.lock")}
    here = versions()
    for folder, record in examination.records.items():
        with examination.guarded(f"{folder}/{PROVENANCE}", "code"):
            _check_commit(examination, folder, record["git"], DIFF, elsewhere="checkout" in record)
            if "checkout" in record:
                _check_commit(examination, folder, record["checkout"], CHECKOUT_DIFF)
            for kind, name, check, made in (
                ("package", "vipo package", "code", record["package_sha256"]),
                ("lock", "requirements.lock", "environment", record["lock_sha256"]),
            ):
                if _recorded_otherwise(examination, record, kind, made):
                    examination.broken(
                        f"{folder}/{PROVENANCE}", check,  # type: ignore[arg-type]
                        f"names a {name} (SHA-256 {short(str(made))}) that its commit does not hold: edited",
                        _AGAIN,
                    )  # fmt: skip
                elif made != present[kind]:
                    message = f"made by another {name} (SHA-256 {short(str(made))}) than the present one"
                    advice = "check out the commit that made it before you compare or extend it, or run it again"
                    examination.remark(folder, check, message, advice)  # type: ignore[arg-type]
            if "updates_made_by" in record:
                examination.remark(
                    folder, "code", "its updates were not all made by the package that the record is of",
                    f"{PROVENANCE} names who made them (updates_made_by); train the run again if one code shall have",
                )  # fmt: skip
            other = [
                f"{name} {made} (here {here.get(name)})"
                for name, made in record["versions"].items()
                if made != here.get(name)
            ]
            if other:
                message = f"made with {', '.join(other)}"
                examination.remark(folder, "environment", message, "install requirements.lock to get the same bytes")


def _recorded_otherwise(examination: Examination, record: Mapping[str, Any], kind: str, made: str | None) -> bool:
    """Whether a clean commit of this repository holds another package or lock than was recorded."""
    git = record["git"]
    if git["commit"] is None or git["diff_sha256"] is not None or "checkout" in record:
        return False
    held = examination.held(git["commit"])[kind]
    return held is not None and held != made


def _check_commit(
    examination: Examination, folder: str, git: Mapping[str, Any], kept_in: str, elsewhere: bool = False
) -> None:
    commit = git["commit"]
    if commit is None:
        message = "was not run from a git repository: no commit names its code"
        examination.remark(folder, "code", message, "run it from a checkout")
        return
    if find_repository(examination.root) is None:
        examination.remark(
            folder, "code", f"commit {short(str(commit))} was not looked up: there is no git repository here",
            "audit it in a checkout of the repository",
        )  # fmt: skip
    elif not has_commit(examination.root, commit):
        shallow = not is_whole(examination.root)
        # Code of another repository than configurations and data need not be in theirs.
        report = examination.remark if shallow or elsewhere else examination.broken
        report(
            folder, "code",
            f"commit {short(str(commit))} is not in this {'shallow clone' if shallow else 'repository'}",
            "fetch the whole history ('git fetch --unshallow'); without that commit nobody can run this code again",
        )  # fmt: skip
    diff, kept = f"{folder}/{kept_in}", git["diff_sha256"]
    found = examination.sha256(examination.folder / diff)
    if found != kept:
        message = "is not the diff that was recorded" if found else "the diff that was recorded is missing"
        examination.broken(diff, "code", message, "restore it: without it nobody can run this code again")
    elif kept is not None:
        changed = ["uncommitted changes"] if git["dirty"] else []
        changed += [f"{len(git['untracked'])} untracked files"] if git["untracked"] else []
        examination.remark(
            folder, "code", f"ran from commit {short(commit)} with {' and '.join(changed)}, kept in {kept_in}",
            f"'git apply {kept_in}' on that commit gives the code; commit before you run what others shall rely on",
        )  # fmt: skip
