"""The Perceptual Structuring Module: backbone and allocator under one configuration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vipo.config.perception import PerceptionConfig
from vipo.perception.allocator import NO_RANGE, AllocationMaps, allocate, combine, finish, minmax
from vipo.perception.backbone import Backbone
from vipo.perception.backbones import CHOSEN
from vipo.perception.components import principal_components
from vipo.perception.errors import PerceptionError
from vipo.perception.orientation import Orientation, is_blind, orientation_scores
from vipo.perception.temporal import average_groups, follow_components, smooth_in_time

# Frames in the backbone at once: what a clip needs in memory does not grow with its length.
_FRAMES = 16


class PerceptualStructuring:
    """Allocation maps of pictures and clips (ViPO, arXiv 2511.18719, section 3)."""

    def __init__(self, backbone: Backbone, config: PerceptionConfig) -> None:
        self.backbone = backbone
        self.config = config

    @property
    def orientation(self) -> Orientation:
        """The rule in use: the configuration's, or else the backbone's own."""
        return self.config.orientation or self.backbone.orientation

    @property
    def evidence(self) -> str:
        """What the rule in use rests on."""
        return self.backbone.evidence if self.orientation == self.backbone.orientation else CHOSEN

    def __call__(
        self, images: Tensor, size: tuple[int, int], frame_groups: Sequence[range] | None = None
    ) -> AllocationMaps:
        """Allocation maps of pictures or clips, without waiting for the device: see `AllocationMaps.check`.

        A picture, or a clip, with a non-finite pixel has no structure to read: its map is 1 and counted as constant.
        Its reward is not finite either, which is what takes the sample out of its group.

        Clips are taken frame by frame (docs/method.md), but each principal direction is followed through the clip and
        its sign decided once, by the sum of the rule's scores: maps do not flip between frames. A frame without
        structure takes the mean of the other frames' maps, and the clip is constant only if no frame has any.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], or clips ``(B, T, 3, H, W)``.
            size: height and width of the latent grid.
            frame_groups: for clips, the frames that each latent frame covers, see `Generator.frame_groups`.

        Returns:
            Maps ``(B, *size)``, of clips ``(B, len(frame_groups), *size)``.

        Raises:
            ValueError: `images` has another shape or type, or the groups do not fit the clip.
        """
        if frame_groups is not None:
            return self._clips(images, size, frame_groups)
        config = self.config
        found = allocate(
            self.backbone(images),
            size,
            components=config.components,
            aggregation=config.aggregation,
            smoothing=config.smoothing,
            orientation=self.orientation,
            normalize=config.normalize,
            exponent=config.exponent,
            floor=config.floor,
        )
        valid = _finite(images)
        maps = torch.where(valid[:, None, None], found.maps, 1.0)
        return AllocationMaps(maps, found.constant | ~valid, found.finite | ~valid, found.converged)

    def _clips(self, clips: Tensor, size: tuple[int, int], groups: Sequence[range]) -> AllocationMaps:
        if clips.ndim != 5 or 0 in clips.shape:
            raise ValueError(f"images: expected clips of shape (B, T, 3, H, W), got {tuple(clips.shape)}")
        batch, frames = clips.shape[:2]
        config, pixels, scores, parts = self.config, [], [], []
        for chunk in clips.flatten(0, 1).split(_FRAMES):
            features = self.backbone(chunk)
            part = principal_components(features, config.components)
            pixels.append(_finite(chunk))
            parts.append(part)
            scores.append(orientation_scores(part.projections, features, self.orientation))
        valid, structured, sound, exact = (
            torch.cat(flags).view(batch, frames)
            for flags in (
                pixels,
                [part.structured for part in parts],
                [part.finite for part in parts],
                [part.converged for part in parts],
            )
        )
        directions = torch.cat([part.directions for part in parts]).unflatten(0, (batch, frames))
        links = follow_components(directions, structured)
        votes = (links @ torch.cat(scores).view(batch, frames, -1, 1)).where(structured[..., None, None], 0.0)
        links = (links * torch.where(votes.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)).flatten(0, 1)
        maps, flat = combine(
            torch.einsum("nkj,njhw->nkhw", links, torch.cat([part.projections for part in parts])),
            (links.abs() @ torch.cat([part.explained for part in parts])[..., None])[..., 0],
            size,
            aggregation=config.aggregation,
            smoothing=config.smoothing,
        )
        maps = maps.unflatten(0, (batch, frames))
        empty = ~structured | flat.view(batch, frames)
        # Ones, as for a picture without structure, would be the largest values of the clip.
        others = torch.where(empty[..., None, None], 0.0, maps).sum(dim=1, keepdim=True)
        others = others / (~empty).sum(dim=1).clamp(min=1)[:, None, None, None]
        maps = torch.where(empty[..., None, None], others, maps)
        maps = smooth_in_time(average_groups(maps, groups), config.temporal_smoothing)
        whole, level = minmax(maps, NO_RANGE, dims=(-3, -2, -1))
        intact = valid.all(dim=1)
        finite = sound.all(dim=1) | ~intact
        constant = (empty.all(dim=1) | level | ~intact) & finite
        weights = finish(
            whole, constant, finite, normalize=config.normalize, exponent=config.exponent, floor=config.floor
        )
        return AllocationMaps(weights, constant, finite, exact.all(dim=1))

    def preflight(self, image_size: tuple[int, int]) -> None:
        """Check on one blank picture that the backbone takes pictures of this size and has room for K components.

        Args:
            image_size: height and width in pixels.

        Raises:
            PerceptionError: K exceeds the feature width, the patch grid has fewer than K + 1 positions or is too thin
                for the orientation rule, or the backbone cannot be run on such pictures.
        """
        backbone, components = self.backbone, self.config.components
        if components > backbone.feature_width:
            raise PerceptionError(
                f"perception.components: {components} exceeds the feature width {backbone.feature_width} of "
                f"{self.config.backbone!r}; lower it or choose another layer"
            )
        height, width = image_size
        try:
            rows, columns = backbone(torch.zeros(1, 3, height, width, device=backbone.mean.device)).shape[2:]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise PerceptionError(
                f"perception.backbone: {self.config.backbone!r} cannot be run on {height}x{width} pictures, which "
                f"enter it as {'x'.join(map(str, backbone.network_size(height, width)))}: {error}"
            ) from error
        found = f"{self.config.backbone!r} gives a {rows}x{columns} grid for {height}x{width} pictures"
        remedy = "raise perception.input_size, or choose an earlier perception.layer"
        if rows * columns < components + 1:
            raise PerceptionError(
                f"perception.components: {components} needs at least {components + 1} patch positions, but {found}; "
                f"{remedy}"
            )
        if is_blind(self.orientation, rows, columns):
            raise PerceptionError(
                f"perception.orientation: {self.orientation!r} cannot tell a direction from its opposite, for {found}; "
                f"{remedy}, or choose another perception.orientation"
            )


def _finite(images: Tensor) -> Tensor:
    """``(B,)`` bool, in one pass without a copy: a sum of values in [0, 1] is finite unless one of them is not."""
    return images.flatten(1).sum(dim=1).isfinite()
