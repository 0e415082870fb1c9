"""The Perceptual Structuring Module: backbone and allocator under one configuration."""

import torch
from torch import Tensor

from vipo.config.models import PerceptionConfig
from vipo.perception.allocator import AllocationMaps, allocate
from vipo.perception.backbones import Backbone, PerceptionError


class PerceptualStructuring:
    """Allocation maps of pictures (ViPO, arXiv 2511.18719, section 3)."""

    def __init__(self, backbone: Backbone, config: PerceptionConfig) -> None:
        self.backbone = backbone
        self.config = config

    def __call__(self, images: Tensor, size: tuple[int, int]) -> AllocationMaps:
        """Allocation maps ``(B, *size)`` of pictures ``(B, 3, H, W)`` in [0, 1].

        A picture with a non-finite pixel has no structure to read: its map is 1 and counted as constant. Its reward
        is not finite either, which is what takes the sample out of its group.

        Raises:
            ValueError: `images` has another shape or type, or finite pictures have non-finite features.
        """
        finite = images.isfinite().flatten(1).all(dim=1)
        features = self.backbone(
            torch.where(finite.view(-1, *[1] * (images.ndim - 1)), images, torch.zeros_like(images))
        )
        found = allocate(
            features,
            size,
            components=self.config.components,
            aggregation=self.config.aggregation,
            smoothing=self.config.smoothing,
            orientation=self.config.orientation or self.backbone.orientation,
            normalize=self.config.normalize,
        )
        return AllocationMaps(torch.where(finite[:, None, None], found.maps, 1.0), found.constant | ~finite)

    def preflight(self, image_size: tuple[int, int]) -> None:
        """Check on one blank picture that the backbone takes pictures of this size and has room for K components.

        Args:
            image_size: height and width in pixels.

        Raises:
            PerceptionError: K exceeds the feature width, the patch grid has fewer than K + 1 positions, or the
                backbone cannot be run on such pictures.
        """
        backbone, components = self.backbone, self.config.components
        if components > backbone.feature_width:
            raise PerceptionError(
                f"perception.components: {components} exceeds the feature width {backbone.feature_width} of "
                f"{self.config.backbone!r}; lower it or choose another layer"
            )
        height, width = image_size
        try:
            grid = backbone(torch.zeros(1, 3, height, width, device=backbone.mean.device)).shape[2:]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise PerceptionError(
                f"perception.backbone: {self.config.backbone!r} cannot be run on {height}x{width} pictures, which "
                f"enter it as {'x'.join(map(str, backbone.network_size(height, width)))}: {error}"
            ) from error
        if grid.numel() < components + 1:
            raise PerceptionError(
                f"perception.components: {components} needs at least {components + 1} patch positions, but "
                f"{self.config.backbone!r} gives a {grid[0]}x{grid[1]} grid for {height}x{width} pictures; "
                "raise perception.input_size, or choose an earlier perception.layer"
            )
