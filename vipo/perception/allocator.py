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

Aggregation = Literal["variance", "average", "first"]
Orientation = Literal["norm", "centre", "border", "skew", "inverted_sklearn", "none"]
Normalization = Literal["minmax", "mean"]

# Up to this size an exact eigendecomposition on the CPU costs less than the iteration below.
_EXACT_SIZE = 128
_OVERSAMPLING = 8
_ITERATIONS = 16
_JACOBI_SWEEPS = 8
_SHIFT = 1e-12
_RESIDUAL = 1e-8
# A float32 network writes constants with relative rounding of about 1e-6; directions below that are its noise.
_NO_STRUCTURE = 1e-5
_NO_VARIANCE = 1e-10
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


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of a batch of feature maps, image by image; float64.

    Attributes:
        projections: ``(B, K, h, w)``, of mean 0. A direction without variance (rank below K) has projection 0.
        explained: ``(B, K)``, ratios of explained variance over the full spectrum.
        directions: ``(B, K, d)`` of unit length; each one's loading of largest magnitude is positive (scikit-learn's
            rule since 1.5). Arbitrary where there is no variance.
        structured: ``(B,)`` bool; false where the relative spread of the features is below 1e-5.
        finite: ``(B,)`` bool; false where a feature is not: there everything else describes features of 0.
        converged: ``(B,)`` bool, see `AllocationMaps`.
    """

    projections: Tensor
    explained: Tensor
    directions: Tensor
    structured: Tensor
    finite: Tensor
    converged: Tensor


def principal_components(features: Tensor, components: int) -> PrincipalComponents:
    """Project centred patch features onto their `components` principal directions, image by image.

    Eigenvectors of the smaller Gram matrix: exact on the CPU; on an accelerator, and on the CPU before the exact
    solution is fallen back to, by a subspace iteration of fixed length that is judged by its residual.

    Args:
        features: ``(B, d, h, w)``.
        components: K, at most ``min(d, h * w - 1)``: centring takes one dimension away.

    Raises:
        ValueError: `features` has the wrong shape, or `components` is out of range.
    """
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(f"features: expected shape (B, d, h, w) without empty dimensions, got {tuple(features.shape)}")
    batch, width, height, breadth = features.shape
    positions = height * breadth
    limit = min(width, positions - 1)
    if not 1 <= components <= limit:
        raise ValueError(
            f"components: {components} is outside 1..{limit} for features of width {width} on a "
            f"{height}x{breadth} grid ({positions} positions, one fewer after centring)"
        )
    finite = features.isfinite().flatten(1).all(dim=1)
    features = torch.where(finite[:, None, None, None], features.detach(), 0.0)
    rows = features.double().flatten(2).transpose(1, 2)
    mean = rows.mean(dim=1, keepdim=True)
    rows = rows - mean
    total = rows.square().sum(dim=(1, 2))
    structured = total > _NO_STRUCTURE**2 * (total + positions * mean.square().sum(dim=(1, 2)))
    if width <= positions:
        variances, directions, converged = _leading_eigenpairs(rows.transpose(1, 2) @ rows, components)
        scores = rows @ directions
    else:
        variances, units, converged = _leading_eigenpairs(rows @ rows.transpose(1, 2), components)
        directions = F.normalize(rows.transpose(1, 2) @ units, dim=1)
        scores = units * variances.clamp(min=0).sqrt()[:, None]
    peak = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    present = variances > _NO_VARIANCE * total[:, None]
    scores = torch.where(present[:, None], scores * sign, 0.0)
    return PrincipalComponents(
        projections=scores.transpose(1, 2).reshape(batch, components, height, breadth),
        explained=torch.where(present, variances / total[:, None], 0.0),
        directions=(directions * sign).transpose(1, 2),
        structured=structured,
        finite=finite,
        converged=converged | ~structured,
    )


def _leading_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest `count` eigenvalues ``(B, count)`` and eigenvectors ``(B, n, count)`` of ``(B, n, n)``, and ``(B,)``
    whether they are exact."""
    if gram.device.type == "cpu" and gram.shape[1] <= _EXACT_SIZE:
        return *_exact(gram, count), torch.ones(len(gram), dtype=torch.bool)
    values, vectors = _subspace_iteration(gram, count)
    residual = (gram @ vectors - vectors * values[:, None]).norm(dim=1).amax(dim=1)
    converged = residual <= _RESIDUAL * values[:, 0]
    # A spectrum without decay converges slowly. Where looking costs nothing, those images, and only those, are
    # solved exactly.
    if gram.device.type == "cpu" and not bool(converged.all()):
        values[~converged], vectors[~converged] = _exact(gram[~converged], count)
        converged = torch.ones_like(converged)
    return values, vectors, converged


def _exact(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(1)[:, :count].clone(), vectors[:, :, -count:].flip(2)


def _subspace_iteration(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Block power iteration with a Rayleigh-Ritz step at the end (Golub and Van Loan, 4th ed., section 8.2)."""
    size = gram.shape[1]
    row = torch.arange(size, dtype=gram.dtype, device=gram.device)
    column = torch.arange(1, min(count + _OVERSAMPLING, size) + 1, dtype=gram.dtype, device=gram.device)
    # Chirps have a flat spectrum, so that no direction is missed; unlike a draw they are made on the device.
    basis = _orthonormal(torch.cos(row.square()[:, None] * column.sqrt()).expand(len(gram), -1, -1))
    for _ in range(_ITERATIONS):
        basis = _orthonormal(gram @ basis)
    basis = _orthonormal(basis)
    values, small = _jacobi(basis.mT @ (gram @ basis))
    return values[:, :count].clone(), basis @ small[:, :, :count]


def _orthonormal(basis: Tensor) -> Tensor:
    """Shifted Cholesky QR (Fukaya et al., SIAM J. Sci. Comput. 42, 2020): unlike Householder's it is batched."""
    inner = basis.mT @ basis
    shift = _SHIFT * inner.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=torch.finfo(inner.dtype).tiny)
    lower = torch.linalg.cholesky_ex(inner + shift[:, None].expand(inner.shape[:2]).diag_embed())[0]
    return torch.linalg.solve_triangular(lower.mT, basis, upper=True, left=False)


def _jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(B, n)``, descending, and eigenvectors ``(B, n, n)`` of small symmetric matrices.

    Cyclic Jacobi (Golub and Van Loan, section 8.5) with a fixed number of sweeps: `torch.linalg.eigh` makes the host
    wait for the device. The rotations of a round act on disjoint pairs, position i with position i + n/2, and rotating
    all positions but the first between rounds lets every pair meet once a sweep.
    """
    size = matrix.shape[1]
    # With an odd size one position sits out each round: a row of zeros, which no rotation touches.
    matrix = F.pad(matrix, (0, size % 2, 0, size % 2))
    half = (size + 1) // 2
    vectors = torch.eye(2 * half, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    for _ in range(_JACOBI_SWEEPS * (2 * half - 1)):
        first, second, between = (
            block.diagonal(dim1=1, dim2=2)
            for block in (matrix[:, :half, :half], matrix[:, half:, half:], matrix[:, :half, half:])
        )
        angle = 0.5 * torch.atan2(2 * between, first - second)
        angle = torch.where(angle.abs() > math.pi / 4, angle - angle.sign() * (math.pi / 2), angle)
        cosine, sine = angle.cos().diag_embed(), angle.sin().diag_embed()
        top, bottom = torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)
        seats = [top[:, :, :1], bottom[:, :, :1], top[:, :, 1:-1], bottom[:, :, 1:], top[:, :, 1:][:, :, -1:]]
        rotation = torch.cat(seats, dim=2)
        matrix, vectors = rotation.mT @ matrix @ rotation, vectors @ rotation
    values = matrix.diagonal(dim1=1, dim2=2)
    if size % 2:
        # After whole sweeps every position is back in its seat.
        values, vectors = values[:, :-1], vectors[:, :-1, :-1]
    values, order = values.sort(dim=1, descending=True)
    return values, vectors.gather(2, order[:, None].expand_as(vectors))


def orient(projections: Tensor, features: Tensor, rule: Orientation) -> Tensor:
    """Give each projection the sign under which large values mean "important": that of its `orientation_scores`.

    Where the score is exactly 0 the sign stays.

    Returns:
        ``(B, K, h, w)``, as `projections`.
    """
    return projections * _sign(orientation_scores(projections, features, rule))[..., None, None]


def _sign(scores: Tensor) -> Tensor:
    return torch.where(scores < 0, -1.0, 1.0).to(scores.dtype)


def is_blind(rule: Orientation, height: int, width: int) -> bool:
    """Whether all cells of a grid look alike to a rule, so that it would decide no direction's sign."""
    if rule == "border":
        return min(height, width) < 3
    return rule == "centre" and max(height, width) < 3


def orientation_scores(projections: Tensor, features: Tensor, rule: Orientation) -> Tensor:
    """Evidence that each projection rises, rather than falls, with importance.

    A principal direction has no sign of its own; every rule but the last two scores ``-z`` with the negative of the
    score of ``z``, and so orients both alike.

    * ``norm``: rises with the norm of the features.
    * ``centre``: rises toward the image's centre.
    * ``border``: lies below its mean on the outermost ring of the grid.
    * ``skew``: the long tail of its values is positive (few positions stand out).
    * ``inverted_sklearn``: always against; from `principal_components` that inverts scikit-learn's sign, as ViPO's
      published code does (1 - min-max).
    * ``none``: always for; from `principal_components` that is scikit-learn's sign.

    Args:
        projections: ``(B, K, h, w)``, of mean 0 over the grid.
        features: ``(B, d, h, w)`` that they were computed from; read by ``norm``.

    Returns:
        ``(B, K)``.

    Raises:
        ValueError: the shapes disagree, the rule is unknown, or it `is_blind` on this grid.
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
    if is_blind(rule, height, width):
        raise ValueError(
            f"orientation: {rule!r} cannot tell a direction from its opposite on a {height}x{width} grid; raise "
            "input_size, or choose an earlier layer"
        )
    if rule == "none":
        return torch.ones_like(projections[..., 0, 0])
    if rule == "inverted_sklearn":
        return -torch.ones_like(projections[..., 0, 0])
    if rule == "skew":
        return projections.pow(3).mean(dim=(2, 3))
    if rule == "norm":
        cue = features.detach().to(projections.dtype).norm(dim=1, keepdim=True)
    elif rule == "centre":
        cue = -_squared_distance_from_centre(height, width, projections)
    elif rule == "border":
        cue = projections.new_zeros(height, width)
        cue[1:-1, 1:-1] = 1.0
    else:
        raise ValueError(f"orientation: {rule!r} is not one of norm, centre, border, skew, inverted_sklearn, none")
    return (projections * (cue - cue.mean(dim=(-2, -1), keepdim=True))).mean(dim=(2, 3))


def _squared_distance_from_centre(height: int, width: int, like: Tensor) -> Tensor:
    y, x = (2 * (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n - 1 for n in (height, width))
    return y[:, None].square() + x[None, :].square()


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
