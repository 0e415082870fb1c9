"""``dvc.lock`` as an anchor: what git has committed of the hashes of an experiment's results.

Read without DVC and without its cache, so that an audit depends on neither. Schema 2.0: every stage lists ``cmd``,
``deps`` and ``outs`` with ``path`` and ``md5``; a folder's is the MD5 of the JSON list of its files' ``md5`` and
``relpath``, sorted by path, with the ending ``.dir``.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from vipo.provenance.records import ProvenanceError, files_below

LOCK = "dvc.lock"


@dataclass(frozen=True)
class LockedStage:
    """One stage of ``dvc.lock``: the MD5 of what it read and wrote, by path relative to the repository's root."""

    name: str
    command: str
    deps: Mapping[str, str]
    outs: Mapping[str, str]


def parse_lock(text: bytes) -> list[LockedStage]:
    """The stages of a ``dvc.lock``.

    Raises:
        ProvenanceError: it is not one of schema 2.0.
    """
    try:
        lock = yaml.safe_load(text)
        if lock["schema"] != "2.0":
            raise ValueError(f"schema {lock['schema']}")
        return [
            LockedStage(
                str(name),
                str(stage["cmd"]),
                *({str(item["path"]): str(item["md5"]) for item in stage.get(kind, [])} for kind in ("deps", "outs")),
            )
            for name, stage in (lock["stages"] or {}).items()
        ]
    # A few kilobytes of brackets are nested deeper than Python's parser goes.
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ProvenanceError(f"{LOCK}: is not of schema 2.0 ({type(error).__name__}: {error})") from error


def dvc_md5(path: Path) -> str | None:
    """What DVC records as the MD5 of a file or folder; None where there is nothing."""
    if path.is_dir():
        files = [{"md5": _md5(path / name), "relpath": name} for name in files_below(path)]
        return f"{hashlib.md5(json.dumps(files).encode(), usedforsecurity=False).hexdigest()}.dir"
    return _md5(path) if path.is_file() else None


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
