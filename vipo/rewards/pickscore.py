"""PickScore: what people pick among pictures of one prompt."""

from pathlib import Path
from typing import Any

from torch import Tensor

from vipo.config.reward_options import ModelOptions, PickScoreOptions
from vipo.rewards.clip import TOKENIZER, ClipReward
from vipo.rewards.pixels import clip_pixels
from vipo.rewards.weights import located


class PickScore(ClipReward):
    """``exp(logit_scale) * cosine``, about 15 to 27.

    Source: Kirstain et al., arXiv 2305.01569, and the model's card, with the pictures of transformers' CLIP processor.
    """

    Options = PickScoreOptions

    def __init__(self, device: str, options: PickScoreOptions) -> None:
        super().__init__(device, options)

    def _pixels(self, images: Tensor, size: int) -> Tensor:
        return clip_pixels(images, size, nearest=False)

    def _scored(self, cosine: Tensor, network: Any) -> Tensor:
        return network.logit_scale.float().exp() * cosine

    def _find_tokenizer(self, options: ModelOptions) -> Path:
        assert isinstance(options, PickScoreOptions)
        return located("tokenizer", options.tokenizer, options.tokenizer_revision, TOKENIZER)
