"""LAION's aesthetic predictor, v2: how much people like a picture, whatever its text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.reward_options import AestheticOptions
from vipo.rewards.clip import OnClip, clip_network
from vipo.rewards.errors import RewardError
from vipo.rewards.linear_head import linear_head
from vipo.rewards.pixels import need_pictures
from vipo.rewards.weights import local_path, read_tensors


class Aesthetic(OnClip):
    """The head's value of CLIP ViT-L/14's unit vector, about 1 to 10.

    Source: improved-aesthetic-predictor (Schuhmann), head ``sac+logos+ava1-l14-linearMSE``.
    """

    Options = AestheticOptions

    def __init__(self, device: str, options: AestheticOptions) -> None:
        self._head = local_path("head", options.head)
        super().__init__(device, options)

    @property
    def weight_files(self) -> list[Path]:
        """What both networks are read from."""
        return [*super().weight_files, self._head]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``(B,)`` float32 of pictures ``(B, 3, H, W)`` in [0, 1]; the prompts are not read."""
        need_pictures(images)
        with self.resident as networks:
            vectors = torch.cat([self.embed(networks["clip"], part) for part in images.split(self._batch)])
            scores: Tensor = networks["head"](vectors).squeeze(1)
        return scores

    def _load(self) -> Any:
        clip, head = clip_network(self._place, self._dtype), linear_head(read_tensors([self._head]), self._head)
        if head[0].in_features != clip.config.projection_dim:
            raise RewardError(
                f"{self._head}: takes vectors of {head[0].in_features} numbers, {self._place} makes "
                f"{clip.config.projection_dim}; the published head is of openai/clip-vit-large-patch14"
            )
        return nn.ModuleDict({"clip": clip, "head": head})

    def _tokenizer_files(self) -> list[Path]:
        return []
