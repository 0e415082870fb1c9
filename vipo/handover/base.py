"""The generator that a run started from, as it is handed over: its parts, its licence."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import checkpoint_location
from vipo.generators.parts import VARIANTS, model_index, named_parts, variant_of
from vipo.handover.card import LICENCE_IDENTIFIER, Licence
from vipo.handover.errors import ExportError

#: What a pipeline's parts consist of. Pickles and code are never copied, nor are weights in a second precision.
_PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*")
_INDEX = ".index.json"


@dataclass(frozen=True)
class Base:
    """The generator that the run started from.

    Attributes:
        folder: of its files.
        pipeline_class: of diffusers.
        parts: beside the trained network that a whole pipeline needs.
        hub_id: None where it has none; so of `revision`.
    """

    folder: Path
    pipeline_class: str
    parts: tuple[str, ...]
    hub_id: str | None
    revision: str | None


def find_base(config: GeneratorConfig, root: Path, base_model: str | None, trained: Collection[str] | None) -> Base:
    """The base of a run, with the files here that are handed over.

    Args:
        config: of the run.
        root: repository root, for relative paths.
        base_model: id on the Hub of a base that the run read from a folder.
        trained: parts that the run brings; None: the others are not handed over.

    Raises:
        ExportError: it cannot be read, or `base_model` is no id or another one.
        GeneratorError: it cannot be found.
    """
    location = checkpoint_location(config, root)
    hub_id = base_model
    if isinstance(location, str):
        if base_model not in (None, location):
            raise ExportError(f"--base-model {base_model!r}: the run was trained on {location!r}, which the card names")
        hub_id = location
    if hub_id is not None:
        try:
            validate_repo_id(hub_id)
        except HFValidationError as error:
            raise ExportError(f"--base-model {hub_id!r}: {error}") from error
    index = model_index(location, config.revision)
    if not isinstance(index.get("_class_name"), str):
        raise ExportError(f"{location}/model_index.json: names no class of diffusers; its own code is not handed over")
    parts = () if trained is None else tuple(name for name in named_parts(index) if name not in trained)
    if isinstance(location, Path):
        return Base(location, index["_class_name"], parts, hub_id, None)
    wanted = ["*.md", "model_index.json", *_TERMS, *(f"{part}/{kind}" for part in parts for kind in _PARTS)]
    try:
        folder = snapshot_download(
            location, revision=config.revision, allow_patterns=wanted, ignore_patterns=list(VARIANTS)
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"{location}: cannot be downloaded or read from the cache ({error})") from error
    return Base(Path(folder), index["_class_name"], parts, hub_id, config.revision)


def base_licence(base: Base, chosen: str | None) -> Licence:
    """The licence that the weights go under.

    Args:
        base: with its card, if it has one.
        chosen: the Hub's identifier; None: the one that the card states.

    Raises:
        ExportError: none is stated, or what is stated or chosen is no licence.
    """
    card = base.folder / "README.md"
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ExportError(f"{card}: its metadata cannot be read ({' '.join(str(error).split())}); mend it") from error
    stated, name, link = ((data or {}).get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(stated, str) or stated == "unknown" or (stated == "other" and not name):
        stated = None
    if chosen is not None and (not LICENCE_IDENTIFIER.match(chosen) or chosen in ("other", "unknown")):
        raise ExportError(
            f"--license {chosen!r}: give an identifier of the Hub, such as apache-2.0; for a licence that has none, "
            f"state license: other, license_name and license_link in {card} and leave --license out"
        )
    if chosen is None and stated is None:
        raise ExportError(
            f"{card}: states no licence of the base; find out which one it is under and name it with --license, "
            "such as --license apache-2.0"
        )
    files = sorted({item.name for pattern in _TERMS for item in base.folder.glob(pattern) if item.is_file()})
    if chosen is None and isinstance(link, str) and "://" not in link:
        if Path(link).name != link or not (base.folder / link).is_file():
            raise ExportError(f"{card}: license_link {link!r} is no file beside it; put the licence's text there")
        files = sorted({*files, link})
    return Licence(chosen, stated, name, link, tuple(files))


def copy_parts(base: Base, folder: Path) -> None:
    """Copy the base's parts, and what names them, for the stock pipeline to load.

    Raises:
        ExportError: a part or its weights are missing.
    """
    if base.parts:
        copy_file(base.folder / "model_index.json", folder / "model_index.json")
    for part in base.parts:
        names = _part_files(base.folder, part)
        if not names:
            raise ExportError(f"{base.folder / part}: missing, but model_index.json names it; copy the base again")
        if "config.json" in names and not any(name.endswith(".safetensors") for name in names):
            raise ExportError(f"{base.folder / part}: has no safetensors weights, and pickles are not handed over")
        for name, stored in names.items():
            copy_file(base.folder / part / stored, folder / part / name)
            if name != stored and name.endswith(_INDEX):
                _rename_shards(folder / part / name, names)


def copy_file(source: Path, target: Path) -> None:
    """Copy content alone: neither links, such as those of the Hub's cache, nor permissions."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _part_files(base: Path, part: str) -> dict[str, str]:
    """Files of a part by their names when handed over: a variant that there is alone is called as plain weights are."""
    folder = base / part
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    plain = filter_repo_objects(names, allow_patterns=list(_PARTS), ignore_patterns=list(VARIANTS))
    found = {name: name for name in plain}
    if (variant := variant_of(base, part)) is not None:
        mark = f".{variant}"
        own = filter_repo_objects([name for name in names if mark in name], allow_patterns=list(_PARTS))
        found |= {name.replace(mark, ""): name for name in own}
    return found


def _rename_shards(file: Path, names: Mapping[str, str]) -> None:
    """An index whose weights are called otherwise here."""
    called = {stored: name for name, stored in names.items()}
    index = json.loads(file.read_text(encoding="utf-8"))
    index["weight_map"] = {tensor: called.get(shard, shard) for tensor, shard in index["weight_map"].items()}
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
