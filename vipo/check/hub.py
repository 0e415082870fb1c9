"""What is in the local cache of the hub, and what the hub itself says: the one place that may open a connection."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vipo.check.wanted import WEIGHTS, Wanted
from vipo.errors import VipoError
from vipo.text import listed

_SECONDS = 20.0
_NAMED = 3
# What `vipo.handover` and the loaders never read.
_UNREAD = ("safety_checker", "feature_extractor", "image_encoder")
_TOP = ("model_index.json", "README.md", "LICENSE*")
_OTHER_FORMATS = ("*.bin", "*.ckpt", "*.pth", "*.msgpack", "*.onnx*")
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "processor", "feature_extractor", "guider")


def cached_folder(repository: str) -> Path:
    """Where the cache keeps a repository of models."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def cached_commit(repository: str, branch: str) -> str | None:
    """The commit that a branch had when it was last fetched; None where it never was."""
    reference = cached_folder(repository) / "refs" / branch
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def snapshot_of(item: Wanted) -> Path | None:
    """The cached folder of what is wanted, at its commit or else its newest one; None where there is none."""
    assert item.repository is not None
    commit = item.revision or cached_commit(item.repository, "main")
    folder = None if commit is None else cached_folder(item.repository) / "snapshots" / commit
    return folder if folder is not None and folder.is_dir() else None


def missing_files(item: Wanted, place: Path, *, cached: bool = False) -> list[str]:
    """What is wanted and not in a file's or folder's place: names, or patterns of names.

    Args:
        item: what is wanted.
        place: where it is.
        cached: the place is the hub's cache. A hub id is read from plain files alone, on every machine alike, whatever
            variants are in the cache.

    Raises:
        GeneratorError: a part of a folder is there in several variants, and none of them is fp16.
    """
    if place.is_file():
        return []
    if item.is_pipeline:
        return list(_missing_parts(place, item.replaced, cached))
    names = [path.name for path in place.iterdir()]
    absent = [pattern for pattern in item.files if not any(fnmatchcase(name, pattern) for name in names)]
    if item.each:
        return absent
    return [" or ".join(item.files)] if len(absent) == len(item.files) else []


def _missing_parts(folder: Path, replaced: Sequence[str], cached: bool) -> Iterator[str]:
    # Only here, for it loads torch.
    from vipo.generators.parts import named_parts, variant_of

    index = folder / "model_index.json"
    if not index.is_file():
        yield index.name
        return
    for name in named_parts(json.loads(index.read_text(encoding="utf-8"))):
        if name in _UNREAD:
            continue
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            yield f"{name}/"
        elif not name.startswith(_WITHOUT_WEIGHTS) and name not in replaced:
            variant = None if cached else variant_of(folder, name)
            yield from (f"{name}/{file}" for file in _missing_weights(part, variant))


def _missing_weights(part: Path, variant: str | None) -> Iterator[str]:
    from vipo.generators.parts import weight_files

    end = "" if variant is None else f".{variant}"
    indices = sorted(part.glob(f"*.safetensors.index{end}.json"))
    for index in indices:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        yield from sorted(name for name in map(str, shards) if not (part / name).is_file())
    files = weight_files(part)
    others = {path for name, paths in files.items() if name != variant for path in paths}
    whole = [path for path in part.glob("*.safetensors") if path not in others and "-of-" not in path.name]
    if not indices and not whole:
        yield f"*{end}.safetensors"


def fetch_command(item: Wanted, commit: str | None) -> str:
    """What brings it into the cache, for a shell."""
    words = ["hf", "download", str(item.repository)]
    words += ["--revision", commit] if commit else []
    included, excluded = _patterns(item)
    words += [word for pattern in included for word in ("--include", pattern)]
    words += [word for pattern in excluded for word in ("--exclude", pattern)]
    return shlex.join(words)


def _patterns(item: Wanted) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the files that are fetched, and of those among them that are not."""
    if item.is_pipeline:
        # Only here, for it loads torch.
        from vipo.generators.parts import VARIANTS

        # Its repository may hold everything once more in one file at the top, in other formats, and as variants, which
        # are not read of a hub id.
        replaced = (f"{part}/*.safetensors" for part in item.replaced)
        return (*_TOP, "*/*"), (*_OTHER_FORMATS, *VARIANTS, *replaced)
    # Of several formats the first: repositories hold the same weights in more than one.
    files = item.files[:1] if item.files == WEIGHTS else item.files
    return (*files, "*.json", "*.txt"), ()


@dataclass(frozen=True)
class Told:
    """What the hub says of a repository.

    Attributes:
        commit: of the revision that was asked for.
        gated: whether it asks for the acceptance of terms.
        sizes: bytes of its files, by name.
    """

    commit: str
    gated: bool
    sizes: dict[str, int]

    def size(self, item: Wanted) -> int:
        """Bytes of what `fetch_command` brings."""
        included, excluded = _patterns(item)
        return sum(size for name, size in self.sizes.items() if _any(name, included) and not _any(name, excluded))

    def parts_of_variants(self, item: Wanted) -> list[str]:
        """Subfolders of a pipeline whose weights are variants alone."""
        from vipo.generators.parts import variant_in

        named = [name.split("/") for name in self.sizes if _any(name, ("*/model*", "*/diffusion_pytorch_model*"))]
        weights = [(part, file[0]) for part, *file in named if len(file) == 1 and file[0].endswith(".safetensors")]
        plain = {part for part, file in weights if variant_in(file) is None}
        return sorted({part for part, _ in weights} - plain - {*_UNREAD, *item.replaced})


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Refused(VipoError):
    """The hub does not give a repository; the message says what to do."""


def ask(repository: str, revision: str) -> Told:
    """Ask the hub for a repository at a branch, a tag or a commit.

    Raises:
        Refused: it cannot be reached, has no such repository or revision, or this account may not read it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        info = api.model_info(repository, revision=revision, timeout=_SECONDS, files_metadata=True)
        if info.gated:
            api.auth_check(repository)
    except GatedRepoError as error:
        raise Refused(
            f"{repository} is gated and this account may not read it: accept its terms on its page of the hub, then "
            "'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise Refused(f"{repository} has no revision {revision!r}; mend it") from error
    except RepositoryNotFoundError as error:
        raise Refused(
            f"{repository}: there is no such repository, or it is private: mend the id, or 'hf auth login'"
        ) from error
    # Of the network, a proxy or the server: each of its own kind.
    except Exception as error:
        raise Refused(
            f"{repository}: the hub could not be asked ({type(error).__name__}: {error}); look at the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    return Told(str(info.sha), bool(info.gated), _sizes(info.siblings or ()))


def _sizes(files: Sequence[Any]) -> dict[str, int]:
    return {str(file.rfilename): int(file.size or 0) for file in files}


def named(files: Sequence[str]) -> str:
    """The first names of what is missing."""
    return listed(list(files), _NAMED)
