"""PickScore: what people pick among pictures of one prompt."""

from typing import Any

from torch import Tensor

from vipo.config.reward_options import PickScoreOptions
from vipo.rewards.clip import ClipReward
from vipo.rewards.pixels import clip_pixels


class PickScore(ClipReward):
    """``exp(logit_scale) * cosine``, about 15 to 27.

    Source: Kirstain et al., arXiv 2305.01569, and the model's card, with the pictures of transformers' CLIP processor.
    """

    Options = PickScoreOptions

    def _pixels(self, images: Tensor, size: int) -> Tensor:
        return clip_pixels(images, size, nearest=False)

    def _scored(self, cosine: Tensor, network: Any) -> Tensor:
        return network.logit_scale.float().exp() * cosine
