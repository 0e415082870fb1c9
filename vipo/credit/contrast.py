"""The source `contrast`: an advantage goes where a sample differs from the other samples of its prompt.

Siblings that agree at a position cannot owe their different rewards to it. No backbone, no decoded picture, no sign to
choose and no call of the network: the clean latents of the group are all that is read. With the same initial noise in a
group what is left between siblings is what the chain's own noise made of them, which is what was rewarded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vipo.config.credit import ContrastCreditConfig
from vipo.credit.costs import Costs
from vipo.credit.source import Context, CreditSource, Samples, Weights
from vipo.perception import Backbone, load_backbone
from vipo.perception.allocator import resize

Scope = Literal["sample", "group"]
Normalization = Literal["mean", "minmax"]

# Of the group's own root mean square: below it, what differs is the rounding of another batch layout.
_AGREES = 1e-6


class ContrastCredit(CreditSource):
    """Where siblings differ, in their clean latents or in a backbone's features of their pictures."""

    options: ContrastCreditConfig
    backbone: Backbone | None = None

    def set_up(self, context: Context) -> None:
        """Load the backbone whose features are compared, where it is features.

        Raises:
            PerceptionError: the backbone cannot be loaded.
        """
        if self.options.of == "latents":
            return
        self.backbone = load_backbone(context.perception, context.generator.config.device, context.root)

    @property
    def inputs(self) -> Mapping[str, Path]:
        """The backbone's weights, where one is read and they are not its package's own."""
        source = None if self.backbone is None else self.backbone.source
        return {} if source is None else {"contrast": source}

    def __call__(self, samples: Samples) -> Weights:
        """The weights; of a sample that agrees with its siblings everywhere, 0 everywhere."""
        costs = Costs()
        if self.backbone is None:
            values = samples.clean
        else:
            values = torch.cat([self._features(pictures, samples.frame_groups) for pictures in samples.pieces()])
            frames = 1 if samples.frame_groups is None else sum(map(len, samples.frame_groups))
            costs = Costs(backbone_calls=frames, bytes_kept=values[0].nbytes)
        found = group_contrast(
            values,
            samples.groups,
            scope=self.options.scope,
            normalize=self.options.normalize,
            exponent=self.options.exponent,
            size=samples.grid,
            among=(samples.gather(values), samples.gather(samples.groups)),
        )
        return Weights(found.weights, mean_one=self.options.normalize == "mean", costs=costs)

    def _features(self, pictures: Tensor, frame_groups: Sequence[range] | None) -> Tensor:
        """``(b, d, h, w)``, of videos ``(b, d, T, h, w)``: the mean over the frames that a latent frame covers."""
        assert self.backbone is not None
        if frame_groups is None:
            return self.backbone(pictures)
        # Frame by frame: the features of a whole clip are many.
        return torch.stack(
            [
                torch.stack([self.backbone(pictures[:, frame]) for frame in frames]).mean(dim=0)
                for frames in frame_groups
            ],
            dim=2,
        )


@dataclass(frozen=True)
class Contrast:
    """Where samples differ from their siblings.

    Attributes:
        weights: ``(N, [T,] H, W)`` float32, non-negative and finite.
        alike: ``(N,)`` bool, samples that agree with their group everywhere (or are not finite): their weights are 0
            everywhere, so that nothing is learned from them.
    """

    weights: Tensor
    alike: Tensor


def group_contrast(
    values: Tensor,
    groups: Tensor,
    *,
    scope: Scope = "sample",
    normalize: Normalization = "mean",
    exponent: float = 1.0,
    size: tuple[int, int] | None = None,
    among: tuple[Tensor, Tensor] | None = None,
) -> Contrast:
    """``W_i(p)`` proportional to ``sqrt(mean over channels of (x_i(p) - mean over the group of x(p))^2)``.

    Args:
        values: ``(N, C, [T,] H, W)``, the clean latents of the samples, or a backbone's features of their pictures. A
            sample that is not finite is left out of its group's mean.
        groups: ``(N,)`` int64 group index of each sample, from 0.
        scope: 'sample': a map for each sample; 'group': one for all of them, the root mean square of theirs, so that
            no sample weighs more than its siblings.
        normalize: 'mean': divided by its mean over positions; 'minmax': scaled to [0, 1] (a map that is the same
            everywhere, and not 0, is 1 everywhere in both).
        exponent: the map is raised to it first; above 1 sharpens it.
        size: height and width that the map is resized to before it is normalised (bilinear, antialiased), where
            features have another grid than the latents; None: as it is.
        among: values and groups of all samples, where `values` are those of one process alone; None: `values` are all.

    Raises:
        ValueError: a shape or an option is invalid.
    """
    if values.ndim not in (4, 5) or groups.shape != values.shape[:1]:
        raise ValueError(
            f"values, groups: expected (N, C, [T,] H, W) and (N,), got {tuple(values.shape)} and {tuple(groups.shape)}"
        )
    if exponent <= 0:
        raise ValueError(f"exponent: {exponent} must be above 0")
    values = values.detach().double()
    everyone, memberships = (values, groups) if among is None else (among[0].detach().double(), among[1])
    finite, sound = (own.flatten(1).isfinite().all(dim=1) for own in (values, everyone))
    maps = torch.zeros(values[:, 0].shape, dtype=torch.float64, device=values.device)
    alike = ~finite
    for group in groups.unique().tolist():
        members, siblings = (groups == group) & finite, everyone[(memberships == group) & sound]
        if not bool(members.any()):
            continue
        mean = siblings.mean(dim=0)
        if scope == "group":
            squares = (siblings - mean).square().mean(dim=(0, 1)).expand(int(members.sum()), *maps.shape[1:])
        else:
            squares = (values[members] - mean).square().mean(dim=1)
        maps[members] = squares.sqrt()
        alike[members] = squares.flatten(1).amax(dim=1).sqrt() <= _AGREES * siblings.square().mean().sqrt()
    if size is not None and tuple(maps.shape[-2:]) != tuple(size):
        frames = maps.reshape(-1, *maps.shape[-2:])
        # Antialiasing weights are non-negative: nothing falls below 0 but by rounding.
        maps = resize(frames, size).clamp_min(0).reshape(*maps.shape[:-2], *size)
    weights = normalized(maps**exponent, normalize)
    return Contrast(torch.where(_column(alike, weights), 0.0, weights).float(), alike)


def normalized(maps: Tensor, normalize: Normalization) -> Tensor:
    """Non-negative maps ``(N, ...)`` on a common scale, each by itself; a map of zeros stays one.

    Args:
        normalize: 'mean': mean 1 over positions; 'minmax': from 0 to 1, or 1 everywhere where a map is the same
            everywhere and not 0.

    Raises:
        ValueError: there is no such normalisation.
    """
    dims = tuple(range(1, maps.ndim))
    top = maps.amax(dim=dims, keepdim=True)
    # First, so that squares of small maps, and sums of large ones, stay in range.
    maps = maps / torch.where(top > 0, top, 1.0)
    if normalize == "mean":
        mean = maps.mean(dim=dims, keepdim=True)
        return maps / torch.where(mean > 0, mean, 1.0)
    if normalize == "minmax":
        low = maps.amin(dim=dims, keepdim=True)
        flat = low >= 1.0
        return torch.where(flat, 1.0, (maps - low) / torch.where(flat, 1.0, 1.0 - low))
    raise ValueError(f"normalize: {normalize!r} is not one of mean, minmax")


def _column(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *([1] * (like.ndim - 1)))
