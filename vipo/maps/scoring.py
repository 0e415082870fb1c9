"""How well allocation maps find known objects: the measurement behind the registry's defaults."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.config.perception import PerceptionConfig
from vipo.demo.scenes import Scene, draw, object_mask, sample_scene
from vipo.maps.pictures import map_size
from vipo.perception.allocator import allocate
from vipo.perception.backbone import Backbone
from vipo.perception.loading import load_backbone
from vipo.perception.orientation import Orientation, is_blind
from vipo.perception.structuring import PerceptualStructuring

ORIENTATIONS: tuple[Orientation, ...] = get_args(Orientation)
Kind = Literal["centred", "off centre", "large", "small", "several"]


@dataclass(frozen=True)
class Scored:
    """Pictures whose objects are known.

    Attributes:
        images: ``(N, 3, H, W)`` in [0, 1].
        masks: ``(N, H, W)``, share of each pixel that objects cover.
    """

    images: Tensor
    masks: Tensor


_DRAWN: Mapping[Kind, Callable[[Scene], bool]] = MappingProxyType(
    {
        "centred": lambda scene: scene.relation is None and scene.objects[0].position == "in the middle",
        "off centre": lambda scene: scene.relation is None and scene.objects[0].position != "in the middle",
        "large": lambda scene: scene.relation is None and scene.objects[0].size == "large",
        "small": lambda scene: scene.relation is None and scene.objects[0].size == "small",
        "several": lambda scene: scene.relation is not None,
    }
)


def drawn_scenes(count: int, seed: int) -> dict[Kind, list[Scored]]:
    """`count` drawn scenes of each kind, of 64x64 pixels; the same seed gives the same scenes."""
    found: dict[Kind, list[Scored]] = {}
    for kind, fits in _DRAWN.items():
        rng = np.random.default_rng([seed, *kind.encode()])
        scenes: list[Scene] = []
        while len(scenes) < count:
            scene = sample_scene(rng, two_objects=0.3)
            if fits(scene):
                scenes.append(scene)
        masks = [np.max([object_mask(item) for item in scene.objects], axis=0) for scene in scenes]
        images = torch.from_numpy(np.stack([draw(scene) for scene in scenes]))
        found[kind] = [Scored(images, torch.from_numpy(np.stack(masks)).float())]
    return found


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive outscores a negative, ties counting half.

    Args:
        scores: ``(n,)``.
        labels: ``(n,)`` bool, with at least one of each.

    Raises:
        ValueError: the shapes differ or a class is empty.
    """
    positives = int(labels.sum())
    negatives = labels.numel() - positives
    if scores.shape != labels.shape or not positives or not negatives:
        raise ValueError(
            f"labels: {positives} positive of shape {tuple(labels.shape)} for scores of shape {tuple(scores.shape)}; "
            "expected equal shapes and at least one of each class"
        )
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[place]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def score_orientations(
    backbone: Backbone,
    config: PerceptionConfig,
    images: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    rules: Sequence[Orientation] = ORIENTATIONS,
) -> dict[Orientation, Tensor]:
    """Area under the ROC curve of the map against the object's mask, by orientation rule.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        masks: ``(N, H, W)``, share of each pixel that the object covers.
        size: grid of the maps; a cell is positive where objects cover more than half of it.

    Returns:
        ``(N,)`` float64 for each rule; NaN for one that is blind on the backbone's grid.

    Raises:
        ValueError: the shapes differ, or at this grid a mask has no positive or no negative cell.
    """
    if masks.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"masks: shape {tuple(masks.shape)} does not fit images of shape {tuple(images.shape)}")
    labels = F.adaptive_avg_pool2d(masks, size).flatten(1) > 0.5
    features = backbone(images)
    scores = {}
    for rule in rules:
        if is_blind(rule, *features.shape[2:]):
            scores[rule] = torch.full((len(images),), torch.nan, dtype=torch.float64)
            continue
        found = allocate(
            features,
            size,
            components=config.components,
            aggregation=config.aggregation,
            smoothing=config.smoothing,
            orientation=rule,
            normalize=config.normalize,
            exponent=config.exponent,
            floor=config.floor,
        )
        found.check()
        areas = [area_under_curve(heat, label) for heat, label in zip(found.maps.flatten(1), labels, strict=True)]
        scores[rule] = torch.tensor(areas, dtype=torch.float64)
    return scores


def orientation_table(
    configs: Sequence[PerceptionConfig],
    sources: Mapping[str, Mapping[Kind, Sequence[Scored]]],
    device: str = "cpu",
) -> Iterator[str]:
    """Score every orientation rule under each configuration: lines of one Markdown table, as they are computed.

    A cell is the mean area under the ROC curve of the map (one cell for 8 pixels, at least 16 a side) against the
    objects; in brackets, where there are any, the share of pictures below 0.5, whose map lies on the background. A dash
    stands where the grid of a picture is too thin for the rule.

    Args:
        configs: sections `perception`; their orientation is not read.
        sources: pictures by source and kind.
        device: where backbones run.

    Raises:
        PerceptionError: a backbone cannot be used, or not on pictures of these sizes.
    """
    kinds = get_args(Kind)
    yield f"| backbone | layer | stride | input | pictures | rule | {' | '.join(kinds)} | all |"
    yield "|" + "---|" * (len(kinds) + 7)
    for config in configs:
        backbone = load_backbone(config, device)
        structuring = PerceptualStructuring(backbone, config.model_copy(update={"orientation": "none"}))
        layer = "default" if config.layer is None else config.layer
        for source, scenes in sources.items():
            for height, width in {item.images.shape[2:] for batches in scenes.values() for item in batches}:
                structuring.preflight((height, width))
            by_kind = {kind: _scores(backbone, config, scenes[kind]) for kind in kinds}
            for rule in ORIENTATIONS:
                cells = [_cell(by_kind[kind][rule]) for kind in kinds]
                cells.append(_cell(torch.cat([by_kind[kind][rule] for kind in kinds])))
                yield (
                    f"| {config.backbone} | {layer} | {backbone.stride} | {backbone.input_size} | {source} | {rule} | "
                    f"{' | '.join(cells)} |"
                )


def _scores(backbone: Backbone, config: PerceptionConfig, batches: Sequence[Scored]) -> dict[Orientation, Tensor]:
    device = backbone.mean.device
    scored = [
        score_orientations(
            backbone, config, item.images.to(device), item.masks.to(device), map_size(*item.images.shape[2:])
        )
        for item in batches
    ]
    return {rule: torch.cat([scores[rule] for scores in scored]) for rule in ORIENTATIONS}


def _cell(areas: Tensor) -> str:
    if areas.isnan().any():
        return "–"
    below = float((areas < 0.5).double().mean())
    return f"{float(areas.mean()):.3f}" + (f" ({below:.1%})" if below else "")
