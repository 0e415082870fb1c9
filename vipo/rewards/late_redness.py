"""A reward that is local in space and in time: how red the object of a clip is when the clip ends."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.rewards.flicker import need_clips
from vipo.rewards.object_redness import measured
from vipo.rewards.scored import Scored


def late_redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scored:
    """Mean of `object_redness` over the later half of the frames, ``(B,)`` in [-1, 1]; the earlier half is not read.

    Of T frames the last ``T // 2``; of nine, those of the last latent frame of a causal autoencoder. Where: the
    object's pixels in those frames.

    Raises:
        RewardError: `images` are not clips of two frames or more.
    """
    need_clips(images)
    late = images[:, -(images.shape[1] // 2) :]
    scores, objects = measured(late.flatten(0, 1))
    where = torch.zeros_like(images[:, :, 0])
    where[:, -late.shape[1] :] = objects.unflatten(0, late.shape[:2])
    return Scored(scores.unflatten(0, late.shape[:2]).mean(dim=1), where)
