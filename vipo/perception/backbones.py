"""Which backbones there are: defaults by name, and what the sign of each one's directions rests on.

Any timm model serves by name or hub id; `efficientnet_lite0` brings its weights in a Python package and works offline.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType

from vipo.config.perception import PACKAGED, PerceptionConfig
from vipo.foreign import is_import_path
from vipo.perception.orientation import Orientation

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


def defaults_of(name: str) -> BackboneDefaults:
    """The first entry whose pattern a name has."""
    return next(defaults for pattern, defaults in REGISTRY.items() if fnmatchcase(name, pattern))


def registered_evidence(config: PerceptionConfig) -> str | None:
    """What the orientation of a configuration's maps rests on by the registry, with nothing loaded.

    None where only the loaded backbone knows: behind an import path, and for a layer counted from the end.
    """
    if is_import_path(config.backbone) or (config.layer or 0) < 0:
        return None
    defaults = defaults_of(config.backbone)
    if config.orientation not in (None, defaults.orientation):
        return CHOSEN
    layer = defaults.layer if config.layer is None else config.layer
    return measured(defaults, config, layer, config.input_size or defaults.input_size)


def measured(defaults: BackboneDefaults, config: PerceptionConfig, layer: int | None, input_size: int | None) -> str:
    """What an entry says was measured at a layer and an input size in pixels; `NOT_MEASURED` of other weights."""
    known = defaults.measured if config.weights is None and config.precision == "fp32" else {}
    return known.get((layer, input_size), NOT_MEASURED)
