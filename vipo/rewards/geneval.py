"""GenEval: whether the objects, counts, colours and places that a prompt names are in the picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipo.config.reward_options import GenEvalOptions, ModelOptions
from vipo.prompts.geneval import COLORS, OBJECTS, geneval_fault
from vipo.rewards.clip import OnClip, clip_network
from vipo.rewards.detection import Detection, Detector, detector_files, need_kinds
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import grey_levels, need_pictures
from vipo.rewards.scored import Scored
from vipo.rewards.weights import located

_TEMPLATES = ("a photo of a {color} {object}", "a photo of a {color}-colored {object}", "a photo of a {color} object")
_MOST_OF_A_CLASS = 16
_BACKGROUND = 0x99
_NEAR = 0.1

Objects = Mapping[str, Sequence[Detection]]
"""What was found, by name, the surest first."""


class GenEval(OnClip):
    """1 where all claims of the prompt's metadata hold, else 0; or the share of them that hold (option `score`).

    Where: the masks of the named objects that were found.

    The published tasks (one object, two objects, counting, colours, position, colour attribution) and thresholds. The
    detector is transformers' Mask2Former on COCO, not mmdetection's of the same network and other training, so scores
    are near GenEval's and not equal to them.

    Source: Ghosh et al., arXiv 2310.11513, and its published evaluation.

    Args:
        device: where both networks compute.
        options: section of the term.
    """

    Options = GenEvalOptions

    def __init__(self, device: str, options: GenEvalOptions) -> None:
        patterns = ("config.json", "preprocessor_config.json", "model*.safetensors")
        place = located("detector", options.detector, options.detector_revision, patterns)
        self._detector_place = _folder("detector", options.detector, place)
        self._own = options
        super().__init__(device, options)

    @property
    def weight_files(self) -> list[Path]:
        """What both networks and the tokenizer are read from."""
        return [*super().weight_files, *sorted(detector_files(self._detector_place))]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
        """Scores ``(B,)`` and where ``(B, H, W)`` of pictures ``(B, 3, H, W)`` in [0, 1]; no gradient passes.

        Raises:
            RewardError: metadata is not GenEval's.
        """
        need_pictures(images)
        for number, row in enumerate(metadata):
            if fault := geneval_fault(row):
                raise RewardError(f"metadata of sample {number}: {fault}; this reward needs GenEval's 'include'")
        levels = grey_levels(images.detach())
        scores, where = [], torch.zeros(len(images), *images.shape[2:])
        with torch.no_grad(), self.resident as networks:
            seen = [found for part in levels.split(self._batch) for found in networks["detector"](part)]
            for number, (picture, row, found) in enumerate(zip(levels, metadata, seen, strict=True)):
                sure = self._own.counting_threshold if row.get("tag") == "counting" else self._own.threshold
                objects = kept(found, sure)

                def colors(name: str, items: Sequence[Detection], picture: Tensor = picture) -> list[str]:
                    return self._colors(networks["clip"], picture, name, items)

                held = claims(objects, row, colors)
                scores.append(float(all(held)) if self._own.score == "strict" else sum(held) / len(held))
                for name in named(row):
                    for item in objects.get(name, ()):
                        where[number][item.mask] = 1
        return Scored(torch.tensor(scores), where)

    def _colors(self, clip: Any, picture: Tensor, name: str, items: Sequence[Detection]) -> list[str]:
        """The colour of each object by CLIP, zero-shot, of its own pixels on grey."""
        texts = [text.format(color=color, object=name) for color in COLORS for text in _TEMPLATES]
        every = self.embed_texts(clip, texts).view(len(COLORS), len(_TEMPLATES), -1)
        kinds = F.normalize(every.mean(dim=1), dim=1)
        crops = []
        for item in items:
            left, top, right, bottom = item.box
            alone = torch.where(item.mask.to(picture.device), picture, float(_BACKGROUND))
            crops.append(self.embed(clip, alone[None, :, top:bottom, left:right].float() / 255))
        chosen = (torch.cat(crops) @ kinds.T).argmax(dim=1)
        return [COLORS[index] for index in chosen.tolist()]

    def _find(self, options: ModelOptions) -> Path:
        return _folder("path", options.path, super()._find(options))

    def _load(self) -> Any:
        detector = Detector(self._detector_place, self._dtype)
        need_kinds(detector, len(OBJECTS), self._detector_place)
        return nn.ModuleDict({"clip": clip_network(self._place, self._dtype), "detector": detector})


def _folder(key: str, path: str, place: Path) -> Path:
    if place.is_file():
        raise RewardError(f"{key} {path!r}: is a file; name its folder")
    return place


def named(row: Mapping[str, Any]) -> list[str]:
    """Names of the objects that metadata asks for."""
    return [claim["class"] for claim in row["include"]]


def kept(found: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Objects above `threshold` by name, the surest first, at most 16 of a class."""
    objects: dict[str, list[Detection]] = {}
    for item in sorted(found, key=lambda item: -item.score):
        if item.score > threshold and len(objects.setdefault(OBJECTS[item.kind], [])) < _MOST_OF_A_CLASS:
            objects[OBJECTS[item.kind]].append(item)
    return objects


def claims(
    objects: Objects, row: Mapping[str, Any], colors: Callable[[str, Sequence[Detection]], Sequence[str]]
) -> list[bool]:
    """Whether each claim of GenEval's metadata holds: of every `include` its count, then its colour and its place where
    it has them (false too where what they are of is not there), and of every `exclude` that there are fewer.

    Args:
        objects: what was found.
        row: metadata.
        colors: the colour of each object, of a name and objects of it.
    """
    held: list[bool] = []
    matched: list[Sequence[Detection] | None] = []
    for claim in row["include"]:
        first = objects.get(claim["class"], ())[: claim["count"]]
        own = [len(first) >= claim["count"]]
        # A row of a table has every column: what is null is not claimed.
        if claim.get("color") is not None:
            right = own[0] and list(colors(claim["class"], first)).count(claim["color"]) >= claim["count"]
            own.append(right)
        if claim.get("position") is not None:
            relation, target = claim["position"]
            others = matched[target]
            placed = all(own) and others is not None
            own.append(placed and all(relation in relations(a, b) for a in first for b in others or ()))
        held += own
        matched.append(first if all(own) else None)
    held += [len(objects.get(claim["class"], ())) < claim["count"] for claim in row.get("exclude") or ()]
    return held


def relations(first: Detection, second: Detection) -> set[str]:
    """Where the first object is as seen from the second: of ``left of``, ``right of``, ``above`` and ``below`` none,
    one or two. Their centres' distance counts as far as it exceeds a tenth of both widths, or heights, together.
    """
    a, b = (torch.tensor(item.box, dtype=torch.float64).view(2, 2) for item in (first, second))
    offset = a.mean(dim=0) - b.mean(dim=0)
    sides = (a[1] - a[0]) + (b[1] - b[0])
    beyond = (offset.abs() - _NEAR * sides).clamp_min(0) * offset.sign()
    if bool((beyond.abs() < 1e-3).all()):
        return set()
    across, down = (beyond / offset.norm()).tolist()
    told = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in told.items() if holds}
