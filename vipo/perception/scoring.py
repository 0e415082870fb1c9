"""How well allocation maps find known objects: the measurement behind the registry's defaults."""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.config.models import PerceptionConfig
from vipo.perception.allocator import Orientation, allocate
from vipo.perception.backbones import Backbone

ORIENTATIONS: tuple[Orientation, ...] = get_args(Orientation)


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
        ``(N,)`` float64 for each rule.

    Raises:
        ValueError: the shapes differ, or at this grid a mask has no positive or no negative cell.
    """
    if masks.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"masks: shape {tuple(masks.shape)} does not fit images of shape {tuple(images.shape)}")
    labels = F.adaptive_avg_pool2d(masks, size).flatten(1) > 0.5
    features = backbone(images)
    scores = {}
    for rule in rules:
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
