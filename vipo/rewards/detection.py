"""Objects in pictures: transformers' Mask2Former, read out as mmdetection does, which GenEval's thresholds are of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.rewards.errors import RewardError
from vipo.rewards.weights import WEIGHTS, filled, matching, read_tensors

# Of one picture, whatever their class.
_MOST = 100


@dataclass(frozen=True)
class Detection:
    """One object that was found.

    Attributes:
        kind: index of its class.
        score: [0, 1].
        box: left, top, right, bottom in pixels, the last two just outside.
        mask: ``(H, W)`` bool, on the CPU.
    """

    kind: int
    score: float
    box: tuple[int, int, int, int]
    mask: Tensor


class Detector(torch.nn.Module):
    """A Mask2Former for instances, and its own picture processor.

    Args:
        place: folder in transformers' layout, with ``preprocessor_config.json``.
        dtype: a key of `vipo.rewards.weights.DTYPES`.

    Raises:
        RewardError: files are missing or do not fit.
    """

    def __init__(self, place: Path, dtype: str) -> None:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

        super().__init__()
        _, _, *weights = detector_files(place)
        config = Mask2FormerConfig.from_pretrained(place)
        self.network = filled(Mask2FormerForUniversalSegmentation, config, read_tensors(weights), place, dtype)
        self.processor = Mask2FormerImageProcessor.from_pretrained(place)
        self.kinds: int = config.num_labels

    def forward(self, levels: Tensor) -> list[list[Detection]]:
        """What is in pictures ``(B, 3, H, W)`` of whole grey levels from 0 to 255, the surest first."""
        height, width = levels.shape[2:]
        files = [picture.permute(1, 2, 0).byte().cpu().numpy() for picture in levels]
        prepared = self.processor(files, return_tensors="pt", input_data_format="channels_last")
        pixels = prepared["pixel_values"].to(self.network.device, self.network.dtype)
        covered = prepared["pixel_mask"][0].bool()
        inner = int(covered.any(dim=1).sum()), int(covered.any(dim=0).sum())
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            found = self.network(pixel_values=pixels)
        return [
            instances(kinds.float(), masks.float(), tuple(pixels.shape[2:]), inner, (height, width))
            for kinds, masks in zip(found.class_queries_logits, found.masks_queries_logits, strict=True)
        ]


def instances(
    kinds: Tensor, masks: Tensor, padded: Sequence[int], inner: tuple[int, int], size: tuple[int, int]
) -> list[Detection]:
    """One picture's objects: the 100 likeliest pairs of query and class, each scored by its class and its mask.

    Args:
        kinds: ``(Q, K + 1)`` logits; the last is "nothing".
        masks: ``(Q, h, w)`` logits over the padded picture.
        padded: its height and width in pixels, as it went in.
        inner: those of the picture within it.
        size: those of the picture as it came.

    Source: mmdetection's MaskFormerFusionHead, instances (Mask2Former, arXiv 2112.01527).
    """
    count = kinds.shape[1] - 1
    likely = kinds.softmax(dim=-1)[:, :-1].flatten()
    scores, chosen = likely.topk(min(_MOST, len(likely)))
    queries = chosen // count
    used, place = queries.unique(return_inverse=True)
    whole = F.interpolate(masks[used][None], size=tuple(padded), mode="bilinear", align_corners=False)
    whole = F.interpolate(whole[..., : inner[0], : inner[1]], size=size, mode="bilinear", align_corners=False)[0]
    inside = whole > 0
    surety = (whole.sigmoid() * inside).sum(dim=(1, 2)) / (inside.sum(dim=(1, 2)) + 1e-6)
    scores = (scores * surety[place]).cpu()
    inside = inside.cpu()
    found = []
    for score, kind, own in zip(scores.tolist(), (chosen % count).tolist(), place.tolist(), strict=True):
        mask = inside[own]
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows):
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            found.append(Detection(kind, score, box, mask))
    return sorted(found, key=lambda item: -item.score)


def detector_files(place: Path) -> list[Path]:
    """What a `Detector` is read from: its configuration, its picture processor's, and its weights.

    Raises:
        RewardError: one of them is missing.
    """
    return [
        path for names in (("config.json",), ("preprocessor_config.json",), WEIGHTS) for path in matching(place, names)
    ]


def need_kinds(detector: Detector, count: int, place: Path) -> None:
    """Refuse a detector of other classes.

    Raises:
        RewardError: it knows another number of them.
    """
    if detector.kinds != count:
        raise RewardError(
            f"{place}: knows {detector.kinds} classes, not COCO's {count}; name one that was trained on it"
        )
