"""A Visual Preference Extractor: a frozen vision network that turns pictures into patch features."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipo.foreign import foreign
from vipo.perception.backbones import NOT_MEASURED
from vipo.perception.errors import PerceptionError
from vipo.perception.orientation import Orientation
from vipo.rounding import hold_in_bf16

_INTERPOLATIONS = ("bilinear", "bicubic")


class Backbone(nn.Module):
    """A frozen network with the preprocessing that it was trained with.

    Args:
        network: maps normalised pictures ``(B, 3, H', W')`` to features ``(B, d, h, w)``.
        feature_width: d.
        orientation: default rule for the sign of a principal direction.
        input_size: shorter side in pixels that pictures are resized to.
        stride: both sides are rounded to a multiple of it, so that the patch grid covers the whole picture.
        mean, std: per channel, of pictures in [0, 1].
        interpolation: ``bilinear`` or ``bicubic``.
        square: pictures are resized to ``input_size x input_size`` whatever their shape, for networks that take
            one size only.
        evidence: what the default orientation rests on.
        source: the file or folder that the weights were read from; None where a package pins them.

    Raises:
        PerceptionError: another interpolation; not every device has it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        feature_width: int,
        orientation: Orientation,
        input_size: int,
        stride: int = 1,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        interpolation: str = "bicubic",
        square: bool = False,
        evidence: str = NOT_MEASURED,
        source: Path | None = None,
    ) -> None:
        super().__init__()
        if interpolation not in _INTERPOLATIONS:
            raise PerceptionError(
                f"perception.backbone: it takes pictures resized with interpolation {interpolation!r}, which is not "
                f"one of {', '.join(_INTERPOLATIONS)}; choose other weights, or set it in their config.json"
            )
        self.network = network.requires_grad_(False)
        self.feature_width = feature_width
        self.orientation: Orientation = orientation
        self.input_size = input_size
        self.stride = stride
        self.interpolation = interpolation
        self.square = square
        self.evidence = evidence
        self.source = source
        self._bf16 = False
        #: Where it is others' code: what names it in the configuration.
        self.import_path: str | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    def __call__(self, images: Tensor) -> Tensor:
        """`forward`; others' code gets a copy of the pictures and runs inside `vipo.foreign.foreign`."""
        call = super().__call__
        if self.import_path is None:
            features: Tensor = call(images)
            return features
        with foreign(PerceptionError, called(self.import_path), self.import_path):
            features = call(images.clone())
        return features

    def in_bf16(self) -> Self:
        """From now on the network computes under autocast to bf16, and holds the weights so that autocast would round;
        pictures are resized, and features given, in float32."""
        hold_in_bf16(self.network)
        self._bf16 = True
        return self

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen backbone has no other."""
        return super().train(False)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels at which a picture of the given size enters the network."""
        if self.square:
            return self.input_size, self.input_size
        scale = self.input_size / min(height, width)
        sides = (max(1, math.floor(side * scale / self.stride + 0.5)) * self.stride for side in (height, width))
        return next(sides), next(sides)

    def forward(self, images: Tensor) -> Tensor:
        """Patch features of pictures.

        Args:
            images: ``(B, 3, H, W)`` floating point in [0, 1], on the backbone's device.

        Returns:
            ``(B, d, h, w)`` float32, without gradient; prefix tokens are dropped.

        Raises:
            ValueError: `images` has another shape or type.
            PerceptionError: the network returns features of another shape than it declares.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point of shape (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}"
            )
        size = self.network_size(*images.shape[2:])
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            pictures = F.interpolate(
                images.float(), size=size, mode=self.interpolation, antialias=True, align_corners=False
            )
            # Bicubic interpolation overshoots at edges.
            features = self.network((pictures.clamp(0, 1) - self.mean) / self.std)
        if features.ndim != 4 or features.shape[:2] != (len(images), self.feature_width):
            raise PerceptionError(
                f"perception.backbone: expected features ({len(images)}, {self.feature_width}, h, w) from pictures "
                f"{tuple(images.shape)}, got {tuple(features.shape)}"
            )
        return features.float()


def called(name: str) -> str:
    """How messages call others' code."""
    return f"perception.backbone: {name!r}"
