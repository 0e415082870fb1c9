"""Rewards that read a demo picture back and compare it with what its caption claims.

They need the metadata that `vipo.demo.scenes.scene_metadata` gives: ``objects`` and ``background``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.demo.seen import check, read_scenes
from vipo.prompts.needs import is_scene
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import need_pictures


def scene(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Share of the caption's claims that hold, ``(B,)`` in [0, 1]. Claims are as in `vipo.demo.seen.check`."""
    return torch.tensor([sum(claims.values()) / len(claims) for claims in _claims(images, metadata)])


def scene_shape(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """1 where every object has its claimed shape, else 0: ``(B,)``."""
    return _one_kind("shape", images, metadata)


def scene_background(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """1 where the background has its claimed colour, else 0: ``(B,)``."""
    return _one_kind("background", images, metadata)


def scene_count(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """1 where there are as many objects as claimed, else 0: ``(B,)``."""
    return _one_kind("count", images, metadata)


def _one_kind(kind: str, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([float(claims[kind]) for claims in _claims(images, metadata)])


def _claims(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, bool]]:
    need_pictures(images)
    for number, claim in enumerate(metadata):
        if not is_scene(claim):
            raise RewardError(
                f"metadata of sample {number} holds no scene (keys: {', '.join(map(str, claim)) or 'none'}); this "
                "reward needs scene metadata: 'objects', each with a 'shape', and 'background', as in data/prompts"
            )
    return [check(seen, claim) for seen, claim in zip(read_scenes(images), metadata, strict=True)]
