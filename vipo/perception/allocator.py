"""The Visual Preference Allocator: from patch features to an allocation map (ViPO, arXiv 2511.18719, section 3).

Pure, batched functions. All arithmetic is float64, so that a map does not depend on the batch it was computed in
beyond rounding far below float32.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.sampling.noise import keyed_generator

Aggregation = Literal["variance", "average", "first"]
Orientation = Literal["norm", "centre", "border", "skew", "none"]
Normalization = Literal["minmax", "mean"]

# Up to this size an exact eigendecomposition costs no more than the Krylov basis below.
_EXACT_SIZE = 512
_OVERSAMPLING = 8
_KRYLOV_DEPTH = 8
_RESIDUAL = 1e-8
# A float32 network writes constants with relative rounding of about 1e-6; directions below that are its noise.
_NO_STRUCTURE = 1e-5
_NO_VARIANCE = 1e-10
_NO_RANGE = 1e-6


@dataclass(frozen=True)
class AllocationMaps:
    """Allocation maps of a batch.

    Attributes:
        maps: ``(B, h, w)`` float32, >= 0, without gradient.
        constant: ``(B,)`` bool; true where the features hold no structure and the map is 1 everywhere.
    """

    maps: Tensor
    constant: Tensor


def principal_components(features: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Project centred patch features onto their `components` principal directions, image by image.

    Eigenvectors of the smaller Gram matrix: exact where it is small, else by a block Krylov space with a keyed start
    (Musco and Musco, NeurIPS 2015), accepted on its residual. Each direction's sign makes its loading of largest
    magnitude positive (scikit-learn's rule since 1.5).

    Args:
        features: ``(B, d, h, w)``, finite.
        components: K, at most ``min(d, h * w - 1)``: centring takes one dimension away.

    Returns:
        Projections ``(B, K, h, w)`` and their ratios of explained variance over the full spectrum ``(B, K)``, both
        float64. A direction without variance (rank below K) has projection 0 and ratio 0.

    Raises:
        ValueError: `features` has the wrong shape or non-finite values, or `components` is out of range.
    """
    _check_features(features)
    batch, width, height, breadth = features.shape
    positions = height * breadth
    limit = min(width, positions - 1)
    if not 1 <= components <= limit:
        raise ValueError(
            f"components: {components} is outside 1..{limit} for features of width {width} on a "
            f"{height}x{breadth} grid ({positions} positions, one fewer after centring)"
        )
    rows = features.detach().double().flatten(2).transpose(1, 2)
    rows = rows - rows.mean(dim=1, keepdim=True)
    total = rows.square().sum(dim=(1, 2))
    if width <= positions:
        variances, directions = _leading_eigenpairs(rows, components)
        scores = rows @ directions
    else:
        variances, units = _leading_eigenpairs(rows.transpose(1, 2), components)
        directions = rows.transpose(1, 2) @ units
        scores = units * variances.clamp(min=0).sqrt()[:, None]
    peak = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    present = variances > _NO_VARIANCE * total[:, None]
    scores = torch.where(present[:, None], scores * torch.where(peak < 0, -1.0, 1.0), 0.0)
    explained = torch.where(present, variances / total[:, None], 0.0)
    return scores.transpose(1, 2).reshape(batch, components, height, breadth), explained


def _leading_eigenpairs(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest `count` eigenvalues ``(B, count)`` and eigenvectors ``(B, d, count)`` of ``rows^T rows``."""
    batch, _, width = rows.shape
    if width <= _EXACT_SIZE:
        return _rayleigh_ritz(rows, torch.eye(width).to(rows).expand(batch, width, width), count)
    block = count + _OVERSAMPLING
    start = torch.randn(width, block, generator=keyed_generator("krylov", width, block), dtype=torch.float64)
    basis = [torch.linalg.qr(start.to(rows.device))[0].expand(batch, width, block)]
    for _ in range(_KRYLOV_DEPTH):
        basis.append(torch.linalg.qr(rows.transpose(1, 2) @ (rows @ basis[-1]))[0])
    values, vectors = _rayleigh_ritz(rows, torch.linalg.qr(torch.cat(basis, dim=2))[0], count)
    residual = (rows.transpose(1, 2) @ (rows @ vectors) - vectors * values[:, None]).norm(dim=1).amax(dim=1)
    # A spectrum without decay converges slowly: those images, and only those, are solved exactly.
    slow = residual > _RESIDUAL * values[:, 0]
    if bool(slow.any()):
        full = torch.eye(width).to(rows).expand(int(slow.sum()), width, width)
        values[slow], vectors[slow] = _rayleigh_ritz(rows[slow], full, count)
    return values, vectors


def _rayleigh_ritz(rows: Tensor, basis: Tensor, count: int) -> tuple[Tensor, Tensor]:
    projected = rows @ basis
    values, small = torch.linalg.eigh(projected.transpose(1, 2) @ projected)
    return values.flip(1)[:, :count].clone(), basis @ small[:, :, -count:].flip(2)


def orient(projections: Tensor, features: Tensor, rule: Orientation) -> Tensor:
    """Give each projection the sign under which large values mean "important".

    A principal direction has no sign of its own; each rule but ``none`` yields the same result for ``z`` and ``-z``
    (except where its cue is exactly 0: then the sign stays).

    * ``norm``: rises with the norm of the features.
    * ``centre``: rises toward the image's centre.
    * ``border``: lies below its mean on the outermost ring of the grid.
    * ``skew``: the long tail of its values is positive (few positions stand out).
    * ``none``: as given; from `principal_components` that is scikit-learn's sign.

    Args:
        projections: ``(B, K, h, w)``, of mean 0 over the grid.
        features: ``(B, d, h, w)`` that they were computed from; read by ``norm``.

    Returns:
        ``(B, K, h, w)``.

    Raises:
        ValueError: the shapes disagree or the rule is unknown.
    """
    if (
        projections.ndim != 4
        or projections.shape[::2] != features.shape[::2]
        or projections.shape[3] != features.shape[3]
    ):
        raise ValueError(
            f"projections: shape {tuple(projections.shape)} does not fit features of shape {tuple(features.shape)}; "
            "expected (B, K, h, w) and (B, d, h, w)"
        )
    height, width = projections.shape[2:]
    if rule == "none":
        return projections
    if rule == "skew":
        score = projections.pow(3).mean(dim=(2, 3))
    else:
        if rule == "norm":
            cue = features.detach().to(projections.dtype).norm(dim=1, keepdim=True)
        elif rule == "centre":
            cue = -_squared_distance_from_centre(height, width).to(projections)
        elif rule == "border":
            cue = torch.zeros(height, width).to(projections)
            cue[1:-1, 1:-1] = 1.0
        else:
            raise ValueError(f"orientation: {rule!r} is not one of norm, centre, border, skew, none")
        score = (projections * (cue - cue.mean(dim=(-2, -1), keepdim=True))).mean(dim=(2, 3))
    return projections * torch.where(score < 0, -1.0, 1.0).to(projections)[..., None, None]


def _squared_distance_from_centre(height: int, width: int) -> Tensor:
    y, x = (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1 for n in (height, width))
    return y[:, None].square() + x[None, :].square()


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of ``(..., h, w)`` equal to ``scipy.ndimage.gaussian_filter(mode="reflect", truncate=4)``.

    Args:
        sigma: standard deviation in grid cells; 0 leaves the maps as they are.
    """
    if sigma == 0:
        return maps
    rows, columns = (_smoothing_matrix(n, sigma).to(maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


def _smoothing_matrix(size: int, sigma: float) -> Tensor:
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma).square())
    # SciPy's "reflect" repeats the edge cell: the period is twice the size.
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))


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
) -> AllocationMaps:
    """Allocation maps of patch features: METHOD section 3, steps 2 to 6.

    Args:
        features: ``(B, d, h, w)``, finite.
        size: height and width of the latent grid.
        components: K.
        aggregation: how the K maps are combined: weighted by explained variance, plain average, or the first alone.
        smoothing: Gaussian sigma on the patch grid; 0 turns it off.
        orientation: rule that fixes each direction's sign, see `orient`.
        normalize: ``minmax`` gives [0, 1]; ``mean`` divides that by its mean over positions.

    Returns:
        Maps ``(B, *size)``. Features without structure (relative spread below 1e-5), or whose map is flat after
        smoothing or resizing, give a map of ones, counted in `constant`.

    Raises:
        ValueError: a shape, `components`, `size`, `smoothing` or an option is invalid, or features are non-finite.
    """
    if min(size) < 1:
        raise ValueError(f"size: {tuple(size)} must be at least 1x1")
    if not (smoothing >= 0 and math.isfinite(smoothing)):
        raise ValueError(f"smoothing: {smoothing} must be a finite number >= 0")
    projections, explained = principal_components(features, components)
    scaled, _ = _minmax(orient(projections, features, orientation))
    if aggregation == "variance":
        combined = (explained[..., None, None] * scaled).sum(dim=1)
    elif aggregation == "average":
        combined = scaled.mean(dim=1)
    elif aggregation == "first":
        combined = scaled[:, 0]
    else:
        raise ValueError(f"aggregation: {aggregation!r} is not one of variance, average, first")
    smoothed, flat_grid = _minmax(smooth(combined, smoothing), _NO_RANGE)
    maps, flat_map = _minmax(resize(smoothed, size), _NO_RANGE)
    constant = _without_structure(features) | flat_grid | flat_map
    if normalize == "mean":
        maps = maps / maps.mean(dim=(1, 2), keepdim=True)
    elif normalize != "minmax":
        raise ValueError(f"normalize: {normalize!r} is not one of minmax, mean")
    return AllocationMaps(torch.where(constant[:, None, None], 1.0, maps).float(), constant)


def _minmax(maps: Tensor, least_range: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scale ``(..., h, w)`` to [0, 1]; also tells ``(...)`` where the range is at most `least_range` (there: 0)."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    flat = high - low <= least_range
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low)), flat[..., 0, 0]


def _without_structure(features: Tensor) -> Tensor:
    rows = features.detach().double().flatten(2)
    spread = (rows - rows.mean(dim=2, keepdim=True)).square().mean(dim=(1, 2))
    return spread <= _NO_STRUCTURE**2 * rows.square().mean(dim=(1, 2))


def _check_features(features: Tensor) -> None:
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(f"features: expected shape (B, d, h, w) without empty dimensions, got {tuple(features.shape)}")
    finite = features.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero()[:, 0].tolist()
        raise ValueError(f"features: non-finite values in sample(s) {bad} of the batch; are the images finite?")
