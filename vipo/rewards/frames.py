"""A picture's reward of a clip: the mean over some of its frames."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.rewards.errors import RewardError
from vipo.rewards.scored import Reward, Scored


class OfFrames:
    """Scores evenly spread frames as pictures of the clip's prompt, from the first one to the last.

    Attributes:
        inner: of pictures; what else it has (its weights' files, its network) is this one's too.
    """

    def __init__(self, inner: Reward, count: int) -> None:
        self.inner = inner
        self._count = count

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor | Scored:
        """The mean of the frames' scores ``(B,)``; where, if the reward says so, each frame has that of the nearest
        one that was read.

        Raises:
            RewardError: `images` are no videos, or the reward does not give a score of each frame.
        """
        places = self._places(images)
        shape = (len(images), len(places))
        found = self.inner(*self._asked(images, prompts, metadata))
        scores, where = found if isinstance(found, Scored) else (found, None)
        count = len(images) * len(places)
        if not isinstance(scores, Tensor) or scores.shape != (count,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise RewardError(f"expected {count} scores, one of each frame that it was given, got {got}")
        mean = scores.unflatten(0, shape).mean(dim=1)
        if where is None:
            return mean
        nearest = (torch.arange(images.shape[1])[:, None] - places).abs().argmin(dim=1)
        return Scored(mean, where.unflatten(0, shape)[:, nearest.to(where.device)])

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if name != "begin":
            return found
        return lambda images, prompts, metadata: found(*self._asked(images, prompts, metadata))

    def _asked(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, list[str], list[Mapping[str, Any]]]:
        places = self._places(images).to(images.device)
        frames = images[:, places].flatten(0, 1)
        return frames, [text for text in prompts for _ in places], [dict(own) for own in metadata for _ in places]

    def _places(self, images: Tensor) -> Tensor:
        if images.ndim != 5:
            raise RewardError(f"reads frames of videos (B, T, 3, H, W), not pictures of shape {tuple(images.shape)}")
        return torch.linspace(0, images.shape[1] - 1, min(self._count, images.shape[1])).round().long()
