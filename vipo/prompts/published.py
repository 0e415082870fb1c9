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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from vipo.prompts.prompt import PromptError
from vipo.provenance.files import atomic_file
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
        files: path, or shell pattern for a dataset.
        text_key: key of the prompt.
        commit: None: the dataset's newest one at the first fetch, which is then recorded.
    """

    repository: str
    files: str
    text_key: str
    commit: str | None = None


SETS: Mapping[str, PublishedSet] = MappingProxyType(
    {
        "parti": PublishedSet(
            "google-research/parti", "PartiPrompts.tsv", "Prompt", "2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071"
        ),
        "geneval": PublishedSet(
            "djghosh13/geneval",
            "prompts/evaluation_metadata.jsonl",
            "prompt",
            "cfaff69be64e411cdbdc88487e3d12da90cd9dd5",
        ),
        "geneval2": PublishedSet(
            "facebookresearch/GenEval2", "geneval2_data.jsonl", "prompt", "c088ab7f65a38ce87f2c5d0ae28bf65bd5ba37b0"
        ),
        "vbench": PublishedSet(
            "Vchitect/VBench", "VBench_full_info.json", "prompt_en", "fed99821796c304bb99a176cecaf1fafeac7c64b"
        ),
        "drawbench": PublishedSet("sayakpaul/drawbench", "*.parquet", "Prompts"),
        "hpd": PublishedSet("zhwang/HPDv2", "benchmark/*.json", "prompt"),
        "pickapic": PublishedSet("yuvalkirstain/pickapic_v1_no_images", "data/test_unique*.parquet", "caption"),
        "vidprom": PublishedSet("WenhaoWang/VidProM", "VidProM_unique.csv", "prompt"),
    }
)


def published_key(name: str, text_key: str) -> str:
    """The key that holds the prompt: a set's own, unless another one than the default is asked for."""
    known = SETS.get(name.removeprefix("set:")) if name.startswith("set:") else None
    return text_key if known is None or text_key != "prompt" else known.text_key


def fetch_published(name: str, root: Path, section: str = "prompts") -> dict[str, bytes]:
    """The files of a published source by name, as they were at the first fetch.

    Args:
        name: see `vipo.config.prompts.is_published`.
        root: repository root; `LOCK` lies below it.
        section: that names the source, for messages.

    Raises:
        PromptError: no such set, it cannot be fetched, or its bytes are not those of the first fetch.
        StorageError: the lock cannot be written.
    """
    lock = root / LOCK
    try:
        known: dict[str, Any] = json.loads(lock.read_text()) if lock.is_file() else {}
        entry = known.get(name)
        commit = None if entry is None else str(entry["commit"])
        wanted = None if entry is None else dict(entry["files"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PromptError(f"{lock}: cannot be read ({error}); restore it from git") from error
    try:
        commit, files = _fetched(name, commit, section)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise PromptError(
            f"{section}.source {name}: cannot be fetched ({' '.join(str(error).split())[:300]}); check the network, or "
            f"fetch the file yourself and name it as {section}.source"
        ) from error
    found = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    if wanted is None:
        sizes = {path: len(data) for path, data in files.items()}
        known[name] = {"commit": commit, "files": found, "bytes": sizes}
        with atomic_file(lock) as path:
            path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    elif wanted != found:
        changed = ", ".join(path for path in {**wanted, **found} if wanted.get(path) != found.get(path))
        raise PromptError(
            f"{section}.source {name}: {changed} is not what was fetched first (SHA-256 in {LOCK}); ask the publisher, "
            "or remove its entry there to take the new bytes, as another experiment's prompts"
        )
    return files


def _fetched(name: str, commit: str | None, section: str) -> tuple[str, dict[str, bytes]]:
    if name.startswith("hub:"):
        match = _HUB.fullmatch(name)
        if match is None:
            raise PromptError(
                f"{section}.source {name}: write hub:OWNER/NAME@COMMIT/PATH, the commit whole (40 digits)"
            )
        return match[2], {match[3]: _of_dataset(match[1], match[2], match[3])}
    known = SETS.get(name.removeprefix("set:"))
    if known is None:
        raise PromptError(f"{section}.source {name}: no such set; one of {', '.join(f'set:{each}' for each in SETS)}")
    if known.commit is not None:
        address = f"{RAW}/{known.repository}/{known.commit}/{known.files}"
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            data: bytes = answer.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise PromptError(f"{address}: is larger than {_MOST_BYTES} bytes")
        return known.commit, {known.files: data}
    info = HfApi().dataset_info(known.repository, revision=commit, timeout=_SECONDS)
    names = sorted(each.rfilename for each in info.siblings or () if fnmatch.fnmatch(each.rfilename, known.files))
    if info.sha is None or not names:
        raise PromptError(f"{section}.source {name}: {known.repository} holds no {known.files}")
    return info.sha, {path: _of_dataset(known.repository, info.sha, path) for path in names}


def _of_dataset(repository: str, commit: str, path: str) -> bytes:
    return read_regular(Path(hf_hub_download(repository, path, repo_type="dataset", revision=commit)), _MOST_BYTES)
