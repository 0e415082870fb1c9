"""Published prompt sets and files of Hugging Face datasets: fetched, pinned, and held to what was fetched first.

None is copied into the repository. What a name stood for at the first fetch (commit, files, SHA-256) is written into
``data/prompts/published.lock.json``; another fetch that gives other bytes is an error. Commit the file: it pins the
prompts of every experiment that names the set.
"""

import fnmatch
import hashlib
import json
import re
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from vipo.prompts.prompt import PromptError
from vipo.provenance.files import atomic_file
from vipo.provenance.locks import run_lock
from vipo.regular import read_regular

LOCK = "data/prompts/published.lock.json"
#: Before a path that `PublishedSet.address` formats; a test puts its own server here.
RAW = "https://raw.githubusercontent.com"
_MOST_BYTES = 2**29
_SECONDS = 60
_HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)@([0-9a-f]{40})/(.+)")


@dataclass(frozen=True)
class PublishedSet:
    """Where a set is published.

    Attributes:
        repository: ``owner/name``, on GitHub where `commit` is given, else of a Hugging Face dataset.
        files: path; of a dataset also several, or shell patterns whose ``*`` crosses no ``/``.
        text_key: key of the prompt.
        category_key: key of what becomes the prompt's `category`; None: it has none.
        by_file: the `category` is the name of the prompt's file, without its ending.
        merged_key: key of lists: prompts that stand there twice have both.
        rows: how many there must be, where no commit pins them; None: any number.
        commit: None: the dataset's newest one at the first fetch, which is then recorded.
    """

    repository: str
    files: tuple[str, ...]
    text_key: str
    category_key: str | None = None
    by_file: bool = False
    merged_key: str | None = None
    rows: int | None = None
    commit: str | None = None


SETS: Mapping[str, PublishedSet] = MappingProxyType(
    {
        "parti": PublishedSet(
            "google-research/parti",
            ("PartiPrompts.tsv",),
            "Prompt",
            category_key="Category",
            commit="2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071",
        ),
        "geneval": PublishedSet(
            "djghosh13/geneval",
            ("prompts/evaluation_metadata.jsonl",),
            "prompt",
            category_key="tag",
            commit="cfaff69be64e411cdbdc88487e3d12da90cd9dd5",
        ),
        "geneval2": PublishedSet(
            "facebookresearch/GenEval2",
            ("geneval2_data.jsonl",),
            "prompt",
            category_key="atom_count",
            commit="c088ab7f65a38ce87f2c5d0ae28bf65bd5ba37b0",
        ),
        # Two prompts stand there twice, for other dimensions: their clips are measured in all of them.
        "vbench": PublishedSet(
            "Vchitect/VBench",
            ("VBench_full_info.json",),
            "prompt_en",
            category_key="dimension",
            merged_key="dimension",
            commit="fed99821796c304bb99a176cecaf1fafeac7c64b",
        ),
        "drawbench": PublishedSet("sayakpaul/drawbench", ("data/*.parquet",), "Prompts", "Category", rows=200),
        # The four styles; beside them lies DrawBench, which is no part of the benchmark's mean.
        "hpd": PublishedSet(
            "zhwang/HPDv2",
            tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
            "prompt",
            by_file=True,
            rows=3200,
        ),
        "pickapic": PublishedSet("yuvalkirstain/pickapic_v1_no_images", ("data/test_unique*.parquet",), "caption"),
        "vidprom": PublishedSet("WenhaoWang/VidProM", ("VidProM_unique.csv",), "prompt"),
    }
)


def known_set(name: str) -> PublishedSet | None:
    """The set that a source ``set:NAME`` names; None of another source, and where there is no such set."""
    return SETS.get(name.removeprefix("set:")) if name.startswith("set:") else None


def published_rows(
    name: str, text_key: str, files: Mapping[str, Sequence[Mapping[str, Any]]], section: str = "prompts"
) -> list[dict[str, Any]]:
    """The rows of a published source, the prompt under the key that is asked for, the set's categories as `category`.

    Args:
        name: see `vipo.config.prompts.is_published`.
        text_key: the key that is asked for; see `published_key`.
        files: rows by file.
        section: that names the source, for messages.

    Raises:
        PromptError: there are more or fewer rows than the set has.
    """
    known, key = known_set(name), published_key(name, text_key)
    rows = [
        {text_key: row.get(key, ""), **{other: value for other, value in row.items() if other != key}}
        | ({"category": Path(path).stem} if known is not None and known.by_file else {})
        for path, own in files.items()
        for row in own
    ]
    if known is None:
        return rows
    if known.rows not in (None, len(rows)):
        raise PromptError(
            f"{section}.source {name}: {len(rows)} rows were fetched, and the set has {known.rows}; what is published "
            f"there is another set now: fetch the files yourself and name them as {section}.source"
        )
    if known.merged_key is not None:
        _merge(rows, text_key, known.merged_key)
    if known.category_key is not None:
        return [{**row, "category": row[known.category_key]} if known.category_key in row else row for row in rows]
    return rows


def _merge(rows: Sequence[dict[str, Any]], text_key: str, key: str) -> None:
    """Give rows of one prompt the lists of all of them, each entry once: only one of the rows will be kept."""
    lists: dict[str, list[Any]] = {}
    for row in rows:
        found = lists.setdefault(str(row[text_key]), [])
        found += [entry for entry in row.get(key, []) if entry not in found]
        row[key] = found


def published_key(name: str, text_key: str) -> str:
    """The key that holds the prompt: a set's own, unless another one than the default is asked for."""
    known = known_set(name)
    return text_key if known is None or text_key != "prompt" else known.text_key


def fetch_published(name: str, root: Path, section: str = "prompts") -> dict[str, bytes]:
    """The files of a published source by name, as they were at the first fetch.

    Args:
        name: see `vipo.config.prompts.is_published`.
        root: repository root; `LOCK` lies below it.
        section: that names the source, for messages.

    Raises:
        PromptError: no such set, it cannot be fetched, or its bytes are not those of the first fetch.
        RunLocked: another process keeps the lock from being written.
        StorageError: the lock cannot be written.
    """
    lock = root / LOCK
    _, commit, wanted = _pinned(lock, name)
    try:
        commit, files = _fetched(name, commit, section)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise PromptError(
            f"{section}.source {name}: cannot be fetched ({' '.join(str(error).split())[:300]}); check the network, or "
            f"fetch the file yourself and name it as {section}.source"
        ) from error
    found = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    if wanted is None:
        # Meanwhile another `prepare` may have pinned this set, or another one.
        with run_lock(lock.parent, wait_seconds=_SECONDS):
            known, _, wanted = _pinned(lock, name)
            if wanted is None:
                sizes = {path: len(data) for path, data in files.items()}
                known[name] = {"commit": commit, "files": found, "bytes": sizes}
                with atomic_file(lock) as path:
                    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
                return files
    if wanted.keys() != found.keys() and all(found[path] == wanted[path] for path in wanted.keys() & found.keys()):
        raise PromptError(
            f"{section}.source {name}: is of other files now ({', '.join(found)}) than when it was fetched first "
            f"({', '.join(wanted)}, in {LOCK}); remove its entry there to take these, as another experiment's prompts"
        )
    if wanted != found:
        changed = ", ".join(path for path in {**wanted, **found} if wanted.get(path) != found.get(path))
        raise PromptError(
            f"{section}.source {name}: {changed} is not what was fetched first (SHA-256 in {LOCK}); ask the publisher, "
            "or remove its entry there to take the new bytes, as another experiment's prompts"
        )
    return files


def _pinned(lock: Path, name: str) -> tuple[dict[str, Any], str | None, dict[str, str] | None]:
    """All entries of the lock; of `name` the commit and the files' SHA-256, None where it is not there yet."""
    try:
        known: dict[str, Any] = json.loads(lock.read_text()) if lock.is_file() else {}
        entry = known.get(name)
        return (known, None, None) if entry is None else (known, str(entry["commit"]), dict(entry["files"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PromptError(f"{lock}: cannot be read ({error}); restore it from git") from error


def _fetched(name: str, commit: str | None, section: str) -> tuple[str, dict[str, bytes]]:
    if name.startswith("hub:"):
        match = _HUB.fullmatch(name)
        if match is None:
            raise PromptError(
                f"{section}.source {name}: write hub:OWNER/NAME@COMMIT/PATH, the commit whole (40 digits)"
            )
        return match[2], {match[3]: _of_dataset(match[1], match[2], match[3])}
    known = known_set(name)
    if known is None:
        raise PromptError(f"{section}.source {name}: no such set; one of {', '.join(f'set:{each}' for each in SETS)}")
    if known.commit is not None:
        (path,) = known.files
        address = f"{RAW}/{known.repository}/{known.commit}/{path}"
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            data: bytes = answer.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise PromptError(f"{address}: is larger than {_MOST_BYTES} bytes")
        return known.commit, {path: data}
    info = HfApi().dataset_info(known.repository, revision=commit, timeout=_SECONDS)
    there = [each.rfilename for each in info.siblings or ()]
    found = {pattern: sorted(path for path in there if _matches(path, pattern)) for pattern in known.files}
    absent = [pattern for pattern, paths in found.items() if not paths]
    if info.sha is None or absent:
        raise PromptError(f"{section}.source {name}: {known.repository} holds no {', '.join(absent) or 'commit'}")
    return info.sha, {path: _of_dataset(known.repository, info.sha, path) for paths in found.values() for path in paths}


def _matches(path: str, pattern: str) -> bool:
    # With as many slashes as the pattern names, none is left for its stars.
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def _of_dataset(repository: str, commit: str, path: str) -> bytes:
    return read_regular(Path(hf_hub_download(repository, path, repo_type="dataset", revision=commit)), _MOST_BYTES)
