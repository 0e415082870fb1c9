"""The parts of a diffusers checkpoint: found, read whole, and refused where a tensor is not what its class takes."""

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from safetensors import safe_open

from vipo.config.generator import GeneratorConfig
from vipo.config.registries import FAMILIES
from vipo.generators.base import GeneratorError
from vipo.text import cause, listed

AGAIN = "if a file is missing or damaged, copy or download generator.path again"

_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.(?P<before>\w+))?(-\d+-of-\d+)?(\.(?P<after>\w+))?\.safetensors\Z"
)
#: What holds a part's weights once more, in the names of files below a pipeline's parts.
VARIANTS = ("*fp16*", "*bf16*", "*int4*", "*non_ema*")
# Of a whole language model that is saved for its encoder: what gives it words back, which no prompt is read with.
_SPEAKS = re.compile(r"lm_head\.weight|decoder\..*")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NAMED = 2

T = TypeVar("T")


def model_index(location: Path | str, revision: str | None) -> dict[str, Any]:
    """Content of a checkpoint's ``model_index.json``.

    Raises:
        GeneratorError: it cannot be read.
    """
    try:
        index = json.loads((snapshot(location, revision) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GeneratorError(f"{location}: model_index.json cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise GeneratorError(f"{location}: model_index.json holds no mapping")
    return index


def named_parts(index: Mapping[str, Any]) -> list[str]:
    """The subfolders that a ``model_index.json`` names, of all that it says."""
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)
    ]


def snapshot(location: Path | str, revision: str | None) -> Path:
    """The local folder of a checkpoint; of a hub id the cache's, with those of its files that were fetched."""
    if isinstance(location, Path):
        return location
    return Path(hf_hub_download(location, "model_index.json", revision=revision)).parent


def fetched(location: Path | str, part: str, config: GeneratorConfig) -> Path:
    """The local folder of a checkpoint; of a hub id the cache's, with a part without weights in it.

    transformers' own loading by a hub id asks for files that are not there, which a cache cannot know.

    Args:
        location: folder or hub id.
        part: its subfolder, or a pattern of several.
        config: section `generator`.

    Raises:
        GeneratorError: it is not in the cache, and cannot be fetched.
    """
    if isinstance(location, Path):
        return location
    try:
        return Path(snapshot_download(location, revision=config.revision, allow_patterns=[f"{part}/*"]))
    except (OSError, ValueError) as error:
        raise GeneratorError(f"{location}/{part}: cannot be fetched ({cause(error)})") from error


def part_class(location: Path | str, index: Mapping[str, Any], part: str, known: Mapping[str, Any]) -> Any:
    """The class that the index names for a part, of those that an adapter knows.

    Raises:
        GeneratorError: it is another.
    """
    entry = index.get(part)
    name = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "none"
    if name not in known:
        raise GeneratorError(f"{location}/model_index.json: {part} class {name!r} is not one of {', '.join(known)}")
    return known[name]


def part_settings(kind: Any, location: Path | str, part: str, config: GeneratorConfig) -> SimpleNamespace:
    """A part's ``config.json`` with the class's defaults for what it leaves out, before any weights are read.

    Args:
        kind: a diffusers class.

    Raises:
        GeneratorError: the file is missing or damaged.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return SimpleNamespace(**{**defaults, **load_part(kind.load_config, location, part, config, weights=False)})


def part_without_weights(
    kind: Any, location: Path | str, part: str, config: GeneratorConfig, within: AbstractContextManager[Any]
) -> Any:
    """A part as its diffusers class `kind` makes it of its ``config.json``, `within` what says where its tensors are.

    Raises:
        GeneratorError: the file is missing or damaged.
    """
    settings = load_part(kind.load_config, location, part, config, weights=False)
    with within:
        return kind.from_config(settings)


def load_part(
    loader: Callable[..., T],
    location: Path | str,
    part: str,
    config: GeneratorConfig,
    *,
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
    remedy: str = AGAIN,
    unread: Collection[str] = (),
) -> T:
    """One part of a checkpoint by its class's `from_pretrained`; weights only from safetensors.

    A part that is there only as a variant (``*.fp16.safetensors``) is read from it.

    Args:
        loader: ``from_pretrained`` of the part's class.
        location: folder or hub id.
        part: subfolder.
        config: section `generator`.
        weights: whether the part has any.
        dtype: of the weights. A step on bf16 weights rounds small updates away: what is trained has fp32.
        remedy: what to do, for the message.
        unread: tensors that may be missing, for nothing reads them.

    Raises:
        GeneratorError: the part is missing or damaged, or a tensor is missing, extra, of another shape, not of
            floating point, or not finite.
    """
    options: dict[str, Any] = {}
    if weights:
        options = {
            "use_safetensors": True,
            "torch_dtype": dtype,
            "output_loading_info": True,
            # Told below, by name: the libraries fill such a tensor at random, or leave it without storage.
            "ignore_mismatched_sizes": True,
            # Told HF_HUB_OFFLINE alone, diffusers asks the hub about weights in several files, and is refused.
            "local_files_only": is_offline_mode(),
        }
        if (variant := variant_of(location, part)) is not None:
            options["variant"] = variant
    try:
        loaded: Any = loader(location, subfolder=part, revision=config.revision, **options)
    except Exception as error:
        if not isinstance(location, Path):
            remedy += " (where the repository has variants only, such as *.fp16.safetensors or *.bf16.safetensors, "
            remedy += "download it and name its folder)"
        elif weights and any((location / part).glob("*.bin")):
            remedy = "vipo reads no *.bin, which can hold code: save the part by its class, as *.safetensors"
        raise GeneratorError(f"{location}/{part}: cannot be loaded ({cause(error)}); {remedy}") from error
    if not weights:
        if isinstance(loaded, str | int | float | list | None):
            raise GeneratorError(f"{location}/{part}: its configuration holds no mapping; {remedy}")
        part_without_weights: T = loaded
        return part_without_weights
    model, told = loaded
    files = weight_files(snapshot(location, config.revision) / part)[options.get("variant")]
    if faults := _faults(model, told, files, unread):
        raise GeneratorError(f"{location}/{part}: does not hold what {type(model).__name__} takes: {faults}; {remedy}")
    found: T = model
    return found


@contextlib.contextmanager
def odd_settings(config: GeneratorConfig, location: Path | str) -> Iterator[None]:
    """Around what reads a checkpoint's configurations, which may say anything.

    Raises:
        GeneratorError: a family of ours stumbled over one; what another adapter raises is its own.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        if config.family not in FAMILIES:
            raise
        raise GeneratorError(
            f"{location}: a setting in its configurations is not of the kind that family {config.family!r} takes "
            f"({cause(error)}); {AGAIN}"
        ) from error


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """A part's safetensors files by their variant; None: the plain ones."""
    found: dict[str | None, list[Path]] = {None: []}
    for path in sorted(folder.glob("*.safetensors")):
        if _WEIGHTS.match(path.name):
            found.setdefault(variant_in(path.name), []).append(path)
    return found


def variant_in(name: str) -> str | None:
    """The variant that the name of a part's weights tells, such as ``fp16``; None: they are the plain ones."""
    match = _WEIGHTS.match(name)
    return None if match is None else match["before"] or match["after"]


def variant_of(location: Path | str, part: str) -> str | None:
    """The variant that a part is there in alone, such as ``fp16``; None: the plain files are there, or it is a hub id.

    Raises:
        GeneratorError: there are several variants, and none of them is fp16.
    """
    if not isinstance(location, Path):
        return None
    files = weight_files(location / part)
    variants = sorted(name for name in files if name is not None)
    if files[None] or not variants:
        return None
    if len(variants) > 1 and "fp16" not in variants:
        raise GeneratorError(
            f"{location}/{part}: its weights are there only as the variants {', '.join(variants)}; "
            "keep the one that is meant, without the variant in its name"
        )
    return "fp16" if "fp16" in variants else variants[0]


def _faults(model: Any, told: Mapping[str, Any], files: Sequence[Path], unread: Collection[str]) -> str:
    stored = stored_dtypes(files)
    # Old files hold the positions of a text encoder, which are no weights.
    counters = {name.split(".")[-1] for name, value in model.named_buffers() if not value.is_floating_point()}
    silent = getattr(model, "get_output_embeddings", lambda: model)() is None
    kinds = {
        "missing": (name for name in told["missing_keys"] if name not in unread),
        "extra": (name for name in told["unexpected_keys"] if not (silent and _SPEAKS.fullmatch(name))),
        "of another shape": (
            f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in told["mismatched_keys"]
        ),
        "not of floating point": not_floating(stored, counters),
        "not finite": (
            name
            for name, value in model.state_dict().items()
            if not value.is_meta and value.is_floating_point() and not bool(value.isfinite().all())
        ),
        "unreadable": told.get("error_msgs", ()),
    }
    return "; ".join(f"{kind}: {listed(names, _NAMED)}" for kind, found in kinds.items() if (names := sorted(found)))


def stored_dtypes(files: Iterable[Path]) -> dict[str, str]:
    """Type of each tensor as safetensors files store it, such as ``F32`` or ``I64``."""
    stored = {}
    for path in files:
        with safe_open(path, framework="pt") as stream:
            stored.update({name: stream.get_slice(name).get_dtype() for name in stream.keys()})  # noqa: SIM118
    return stored


def not_floating(stored: Mapping[str, str], but: Iterable[str] = ()) -> list[str]:
    """Tensors of another type than floating point, each with its type.

    Args:
        stored: as `stored_dtypes` gives it.
        but: last parts of names that may have one.
    """
    allowed = frozenset(but)
    return [
        f"{name} ({kind})"
        for name, kind in stored.items()
        if kind not in _FLOATS and name.split(".")[-1] not in allowed
    ]
