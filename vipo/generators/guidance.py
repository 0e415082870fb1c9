"""Classifier-free guidance: the policy of a guided family is the guided prediction."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vipo.generators.base import NEGATIVE, Conditioning
from vipo.generators.trained import TrainedNetworks


class GuidedNetworks(TrainedNetworks):
    """A generator whose predictions are led away from a negative prompt's.

    Attributes:
        guides: whether the family is guided away from `negative_prompt`.
        neutral_guidance: the `guidance_scale` at which, and below, the stock pipeline guides no more.
    """

    guides: ClassVar[bool] = True
    neutral_guidance: ClassVar[float] = 1.0

    def guided(
        self,
        call: Callable[[Tensor, Tensor, Conditioning], Tensor],
        latents: Tensor,
        time: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): `combined` of the negative and the positive
        prediction. As in the stock pipelines, there is none at `neutral_guidance` or below.

        Both branches share one network call, in the rollout and in the update alike: the wrapper that trains on several
        devices writes the network's buffers at every call, which a second call before the backward pass would undo.

        Args:
            call: predicts from latents, time and conditioning of one batch.
            latents, time, conditioning: as in `predict`; every name has a counterpart that begins with `NEGATIVE`.
        """
        positive = {name: value for name, value in conditioning.items() if not name.startswith(NEGATIVE)}
        above = self.config.guidance_scale - self.neutral_guidance
        if above <= 0:
            return call(latents, time, positive)
        both = {name: torch.cat([conditioning[NEGATIVE + name], value]) for name, value in positive.items()}
        without, wanted = call(torch.cat([latents] * 2), torch.cat([time] * 2), both).float().chunk(2)
        return self.combined(without, wanted, 1 + self.guidance_at(time) - self.neutral_guidance)

    def guidance_at(self, time: Tensor) -> Any:
        """The guidance scale at each sample's time, a number or what broadcasts with latents."""
        return self.config.guidance_scale

    def combined(self, without: Tensor, wanted: Tensor, scale: Any) -> Tensor:
        """``n + scale (p - n)`` of the negative and the positive prediction, both as the network gives them."""
        return without + scale * (wanted - without)
