"""The Visual Preference Allocator: from patch features to an allocation map (ViPO, arXiv 2511.18719, section 3).

Pure, batched functions. All arithmetic is float64, so that a map does not depend on the batch it was computed in
beyond rounding far below float32. On an accelerator nothing here waits for the device: no branch reads a tensor, and
what can go wrong comes back as flags beside the maps.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.errors import VipoError
from vipo.perception.components import principal_components
from vipo.perception.orientation import Orientation, orient

Aggregation = Literal["variance", "average", "first"]
Normalization = Literal["minmax", "mean"]

NO_RANGE = 1e-6


@dataclass(frozen=True)
class AllocationMaps:
    """Allocation maps of a batch of pictures or clips.

    Attributes:
        maps: ``(B, h, w)``, of clips ``(B, T_lat, h, w)``; float32, >= 0, without gradient. NaN where not `finite`.
        constant: ``(B,)`` bool; true where the features hold no structure and the map is 1 everywhere.
        finite: ``(B,)`` bool; false where features are not finite, see `check`.
        converged: ``(B,)`` bool; false where the principal directions of an accelerator's iteration of fixed length
            are not exact, because the spectrum hardly decays. The map is then approximate. Always true on the CPU.
    """

    maps: Tensor
    constant: Tensor
    finite: Tensor
    converged: Tensor

    def check(self) -> None:
        """Read the flags, once, when the results are read: on an accelerator this waits for it.

        Raises:
            VipoError: the features of a sample are not finite.
        """
        if not bool(self.finite.all()):
            bad = (~self.finite).nonzero()[:, 0].tolist()
            raise VipoError(
                f"perception: the backbone's features are non-finite in sample(s) {bad} of the batch although the "
                "pictures are finite; check the weights (vipo map shows the map of any picture)"
            )


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of ``(..., h, w)`` equal to ``scipy.ndimage.gaussian_filter(mode="reflect", truncate=4)``.

    Args:
        sigma: standard deviation in grid cells; 0 leaves the maps as they are.
    """
    if sigma == 0:
        return maps
    rows, columns = (smoothing_matrix(n, sigma, maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


def smoothing_matrix(size: int, sigma: float, like: Tensor) -> Tensor:
    """The ``(size, size)`` matrix, of `like`'s type and device, of SciPy's ``gaussian_filter1d`` with its defaults."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=like.device)
    weights = torch.exp(-0.5 * (offsets.double() / sigma).square())
    cells = torch.arange(size, device=like.device)
    # SciPy's "reflect" repeats the edge cell: the period is twice the size.
    source = (cells[:, None] + offsets) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    reached = (source[..., None] == cells).to(torch.float64)
    return ((weights / weights.sum())[:, None] * reached).sum(dim=1).to(like.dtype)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased resize of ``(B, h, w)`` to ``(B, *size)``."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", antialias=True, align_corners=False)[:, 0]


def allocate(
    features: Tensor,
    size: tuple[int, int],
    *,
    components: int,
    aggregation: Aggregation,
    smoothing: float,
    orientation: Orientation,
    normalize: Normalization,
    exponent: float = 1.0,
    floor: float = 0.0,
) -> AllocationMaps:
    """Allocation maps of patch features: docs/method.md, Allocation map.

    Args:
        features: ``(B, d, h, w)``.
        size: height and width of the latent grid.
        components: K.
        aggregation: how the K projections become one map. ``variance``: each scaled to [0, 1], weighted by its
            explained variance; ``average``: their plain mean, unscaled, so that each counts by its own range (the
            published ablation); ``first``: the first alone.
        smoothing: Gaussian sigma on the patch grid; 0 turns it off.
        orientation: rule that fixes each direction's sign, see `orientation_scores`.
        normalize: ``minmax`` gives [0, 1]; ``mean`` divides that by its mean over positions.
        exponent, floor: see `finish`.

    Returns:
        Maps ``(B, *size)``. Features without structure (relative spread below 1e-5), or whose map is flat after
        smoothing or resizing, give a map of ones, counted in `constant`.

    Raises:
        ValueError: a shape, `components`, `size`, `smoothing` or an option is invalid.
    """
    found = principal_components(features, components)
    oriented = orient(found.projections, features, orientation)
    maps, flat = combine(oriented, found.explained, size, aggregation=aggregation, smoothing=smoothing)
    constant = ~found.structured | flat
    return AllocationMaps(
        finish(maps, constant, found.finite, normalize=normalize, exponent=exponent, floor=floor),
        constant & found.finite,
        found.finite,
        found.converged,
    )


def combine(
    projections: Tensor, explained: Tensor, size: tuple[int, int], *, aggregation: Aggregation, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Oriented projections ``(B, K, h, w)`` as one map each: docs/method.md, Allocation map.

    Args:
        explained: ``(B, K)``; read by the aggregation ``variance``.
        size, aggregation, smoothing: see `allocate`.

    Returns:
        ``(B, *size)`` float64 in [0, 1], reaching both ends; and ``(B,)`` bool, true where it is flat instead.

    Raises:
        ValueError: `size`, `smoothing` or `aggregation` is invalid.
    """
    if min(size) < 1:
        raise ValueError(f"size: {tuple(size)} must be at least 1x1")
    if not (smoothing >= 0 and math.isfinite(smoothing)):
        raise ValueError(f"smoothing: {smoothing} must be a finite number >= 0")
    if aggregation == "variance":
        combined = (explained[..., None, None] * minmax(projections)[0]).sum(dim=1)
    elif aggregation == "average":
        # Scaled before smoothing as the others are: what counts as flat after it is measured against [0, 1].
        combined, _ = minmax(projections.mean(dim=1))
    elif aggregation == "first":
        combined, _ = minmax(projections[:, 0])
    else:
        raise ValueError(f"aggregation: {aggregation!r} is not one of variance, average, first")
    smoothed, flat_grid = minmax(smooth(combined, smoothing), NO_RANGE)
    maps, flat_map = minmax(resize(smoothed, size), NO_RANGE)
    return maps, flat_grid | flat_map


def finish(
    maps: Tensor, constant: Tensor, finite: Tensor, *, normalize: Normalization, exponent: float, floor: float
) -> Tensor:
    """The weights of the advantage: ``floor + (1 - floor) * M ** exponent``, divided by its mean if asked.

    Args:
        maps: ``(B, ..., h, w)`` float64 in [0, 1]: M.
        constant, finite: ``(B,)`` bool; 1 everywhere where constant, NaN where not finite.
        normalize: ``mean`` divides by the mean over all positions of a sample.
        exponent: above 1 sharpens the map, below 1 flattens it.
        floor: weight of the least important position, in [0, 1).

    Returns:
        As `maps`, float32.

    Raises:
        ValueError: an option is invalid.
    """
    if not (exponent > 0 and math.isfinite(exponent)):
        raise ValueError(f"exponent: {exponent} must be a finite number > 0")
    if not 0 <= floor < 1:
        raise ValueError(f"floor: {floor} must be in [0, 1)")
    maps = floor + (1 - floor) * maps**exponent
    if normalize == "mean":
        maps = maps / maps.mean(dim=tuple(range(1, maps.ndim)), keepdim=True)
    elif normalize != "minmax":
        raise ValueError(f"normalize: {normalize!r} is not one of minmax, mean")
    shape = (-1, *[1] * (maps.ndim - 1))
    return torch.where(finite.view(shape), torch.where(constant.view(shape), 1.0, maps), math.nan).float()


def minmax(maps: Tensor, least_range: float = 0.0, *, dims: tuple[int, ...] = (-2, -1)) -> tuple[Tensor, Tensor]:
    """Scale `maps` to [0, 1] over `dims`; also tells, without them, where the range is at most `least_range` (0)."""
    low, high = maps.amin(dim=dims, keepdim=True), maps.amax(dim=dims, keepdim=True)
    flat = high - low <= least_range
    scaled = torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low))
    return scaled, flat.squeeze(dims)
