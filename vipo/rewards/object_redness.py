"""A local, continuous reward: how red the object is, whatever its surroundings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.demo.seen import foreground
from vipo.rewards.pixels import need_pictures
from vipo.rewards.redness import redness_map
from vipo.rewards.scored import Scored

# The smallest object of a demo scene covers 4 % of the picture. Without a least size, a handful of stray
# red pixels would be the best object of all.
_MIN_SHARE = 0.005


def object_redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
    """Mean redness of the pixels that stand out from the picture's border colour, ``(B,)`` in [-1, 1], and which.

    A picture in which fewer than 0.5 % of the pixels stand out has no object and scores -1, the lowest.

    Raises:
        RewardError: `images` are videos.
    """
    need_pictures(images)
    return Scored(*measured(images))


def measured(images: Tensor) -> tuple[Tensor, Tensor]:
    """What `object_redness` has of pictures ``(B, 3, H, W)``: scores ``(B,)`` and the object's pixels ``(B, H, W)``."""
    mask = foreground(images)
    pixels = mask.sum(dim=(1, 2))
    mean = (redness_map(images) * mask).sum(dim=(1, 2)) / pixels.clamp(min=1)
    return torch.where(pixels >= _MIN_SHARE * mask[0].numel(), mean, -1.0), mask.float()
