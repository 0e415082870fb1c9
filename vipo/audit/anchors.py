"""What fixes the bytes of results from outside: the committed ``dvc.lock``, or a signature of the crate."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from vipo.audit.examination import CHECKPOINT, Examination, short
from vipo.audit.findings import Anchor
from vipo.provenance.commits import commit_file, last_change
from vipo.provenance.crate import METADATA, SIGNATURE, crate_files
from vipo.provenance.dvc import LOCK, LockedStage, dvc_md5, parse_lock
from vipo.provenance.files import text_lines
from vipo.provenance.git import ForgedObject, MissingObject, find_repository, repository_problem
from vipo.provenance.records import ProvenanceError, files_below
from vipo.provenance.signature import SignatureError, verify_file
from vipo.provenance.upload import MANIFEST

_CRATE_AGAIN = "restore it, or run 'vipo crate' again if the experiment was changed on purpose"
_LOCK_AGAIN = "restore it ('dvc checkout'), or run the stage again and commit the new dvc.lock"


def check_crate(examination: Examination, allowed_signers: Path | None) -> Anchor | None:
    """Compare every file with the crate's metadata, and the metadata with its signature."""
    signer = _signer(examination, allowed_signers)
    if METADATA not in examination.files:
        return None
    named: dict[str, Mapping[str, Any]] = {}
    with examination.guarded(METADATA, "bytes"):
        graph = json.loads((examination.folder / METADATA).read_text(encoding="utf-8"))["@graph"]
        named = {unquote(entity["@id"]): entity for entity in graph if "File" in entity["@type"]}
    examination.described |= named.keys()
    for name, entity in named.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            examination.broken(METADATA, "bytes", f"names {name}, which is not in the experiment", _CRATE_AGAIN)
            continue
        found = examination.sha256(examination.folder / name)
        if found is None:
            examination.broken(name, "bytes", "missing, the crate names it", _CRATE_AGAIN)
        elif found != entity.get("sha256"):
            message = f"changed: SHA-256 {short(found)}, the crate says {short(str(entity.get('sha256')))}"
            # A start that makes no crate writes configurations too; what decides in them is compared by sections.
            derived = signer is None and name.startswith("configs/")
            (examination.remark if derived else examination.broken)(name, "bytes", message, _CRATE_AGAIN)
    for name in crate_files(examination.folder):
        if name not in named:
            report = examination.remark if signer is None else examination.broken
            report(name, "unknown file", "the crate does not name it: added after it was written", _CRATE_AGAIN)
    if signer is None:
        return None
    checkpoints = {name.removesuffix("/manifest.json") for name in named if CHECKPOINT.fullmatch(name)}
    examination.anchored |= named.keys() | checkpoints | {METADATA, SIGNATURE}
    return Anchor(kind="signature", by=signer, covers=len(named))


def _signer(examination: Examination, allowed_signers: Path | None) -> str | None:
    if allowed_signers is None:
        if SIGNATURE in examination.files:
            examination.remark(
                SIGNATURE, "anchor", "the signature was not checked",
                "name the keys that you trust: --allowed-signers FILE",
            )  # fmt: skip
        return None
    try:
        return verify_file(examination.folder / METADATA, allowed_signers)
    except SignatureError as error:
        examination.broken(
            SIGNATURE, "anchor", f"the crate is not signed by anyone you trust: {error}",
            "do not rely on these results before whoever made them has signed them ('vipo crate --sign KEY')",
        )  # fmt: skip
        return None


def check_exports(examination: Examination) -> None:
    """Compare what was exported for others with the list that each folder holds."""
    for path in sorted((examination.folder / "export").glob(f"*/{MANIFEST}")):
        folder = path.parent
        place = folder.relative_to(examination.folder).as_posix()
        with examination.guarded(f"{place}/{MANIFEST}", "bytes"):
            lines = text_lines(path.read_text("utf-8"))
            told = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
            found = {name: examination.sha256(folder / name) for name in files_below(folder) if name != MANIFEST}
            for name in sorted(told.keys() | found.keys()):
                if found.get(name) != told.get(name):
                    examination.broken(
                        f"{place}/{name}", "bytes", f"missing, added or not as {MANIFEST} says", "export the run again"
                    )


def check_lock(examination: Examination) -> tuple[Anchor | None, list[LockedStage]]:
    """Compare results and their inputs with the ``dvc.lock`` that is committed; returns its stages for them as well."""
    lock, text, commit = examination.root / LOCK, None, None
    try:
        repository = find_repository(examination.root)
        if repository is not None and repository.head is not None:
            text = commit_file(examination.root, repository.head, LOCK)
            commit = last_change(examination.root, LOCK)
    except (ForgedObject, MissingObject) as error:
        examination.broken(LOCK, "anchor", str(error), "clone the repository again from where you trust it")
        return None, []
    current = lock.read_bytes() if lock.is_file() else None
    if text is None:
        if problem := repository_problem(examination.root):
            examination.remark(
                LOCK, "anchor", f"was not looked up: git does not read this repository ({problem})",
                "do what git says, and audit again",
            )  # fmt: skip
        elif current is not None:
            examination.remark(LOCK, "anchor", "is not committed, so it anchors nothing", "commit it")
        return None, []
    try:
        stages = parse_lock(text)
    except ProvenanceError as error:
        examination.broken(LOCK, "anchor", str(error), "run 'dvc repro' and commit the dvc.lock that it writes")
        return None, []
    prefix = f"{_relative(examination)}/"
    own = [stage for stage in stages if any(path.startswith(prefix) for path in stage.outs)]
    if not own:
        return None, []
    if current != text:
        examination.broken(
            LOCK, "anchor", "is not the committed one" if current is not None else "missing, but committed",
            "restore it ('git checkout dvc.lock'), or commit it if the experiment was run again",
        )  # fmt: skip
    outs = {path: md5 for stage in stages for path, md5 in stage.outs.items()}
    anchored = {path.removeprefix(prefix): md5 for path, md5 in outs.items() if path.startswith(prefix)}
    for name, md5 in anchored.items():
        with examination.guarded(name, "bytes"):
            _check_out(examination, name, md5)
    for stage in own:
        for path, md5 in stage.deps.items():
            with examination.guarded(path, "lineage"):
                _check_dep(examination, stage, path, md5, outs.get(path))
    examination.anchored |= anchored.keys()
    return Anchor(kind="dvc.lock", by=commit or "", covers=len(anchored)), own


def _relative(examination: Examination) -> str:
    folder, root = examination.folder, examination.root
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.as_posix()


def _check_out(examination: Examination, name: str, md5: str) -> None:
    found = dvc_md5(examination.folder / name)
    if found is None:
        examination.broken(name, "bytes", "missing, dvc.lock names it", "fetch it ('dvc pull'), or run its stage again")
    elif found != md5:
        message = f"changed: MD5 {short(found)}, dvc.lock says {short(md5)}"
        examination.broken(name, "bytes", message, _LOCK_AGAIN)


def _check_dep(examination: Examination, stage: LockedStage, path: str, md5: str, written: str | None) -> None:
    if written is not None:
        if written != md5:
            message = f"stage {stage.name} read {path} with MD5 {short(md5)}, its stage wrote {short(written)}"
            examination.broken(LOCK, "lineage", message, "run 'dvc repro' and commit the new dvc.lock")
        return
    found = dvc_md5(examination.root / path)
    if found != md5:
        message = f"is not what {stage.name} read: MD5 {short(found or 'none')}, dvc.lock says {short(md5)}"
        examination.remark(path, "lineage", message, "'dvc repro' would make other results; restore it for these")
