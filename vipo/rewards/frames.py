"""A picture's reward of a clip: the mean over some of its frames."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from vipo.rewards.errors import RewardError

Inner = TypeVar("Inner", bound=Callable[..., Any])


class _Asked(NamedTuple):
    images: Tensor
    prompts: list[str]
    metadata: list[Mapping[str, Any]]


class OfFrames(Generic[Inner]):
    """Scores evenly spread frames as pictures of the clip's prompt, from the first one to the last.

    Attributes:
        inner: of pictures; what else it has (its weights' files, its network) is this one's too.
    """

    def __init__(self, inner: Inner, count: int) -> None:
        self.inner = inner
        self._count = count

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
        """The mean of the frames' scores ``(B,)``; where, if the reward says so, each frame has that of the nearest
        one that was read."""
        places = self._places(images)
        found = self.inner(*self._asked(images, prompts, metadata))
        scores, where = found if isinstance(found, tuple) else (found, None)
        mean = scores.unflatten(0, (len(images), len(places))).mean(dim=1)
        if where is None:
            return mean if scores is found else type(found)(mean)
        nearest = (torch.arange(images.shape[1])[:, None] - places).abs().argmin(dim=1)
        return type(found)(mean, where.unflatten(0, (len(images), len(places)))[:, nearest.to(where.device)])

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if name != "begin":
            return found
        return lambda images, prompts, metadata: found(*self._asked(images, prompts, metadata))

    def _asked(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> _Asked:
        places = self._places(images).to(images.device)
        count = len(places)
        texts = [prompt for prompt in prompts for _ in range(count)]
        return _Asked(images[:, places].flatten(0, 1), texts, [dict(own) for own in metadata for _ in range(count)])

    def _places(self, images: Tensor) -> Tensor:
        if images.ndim != 5:
            raise RewardError(f"reads frames of videos (B, T, 3, H, W), not pictures of shape {tuple(images.shape)}")
        return torch.linspace(0, images.shape[1] - 1, min(self._count, images.shape[1])).round().long()
