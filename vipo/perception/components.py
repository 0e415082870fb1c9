"""Principal components of patch features, image by image: batched, float64, without waiting for an accelerator."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
    pairs, turn = _pairs(half, matrix), _turn(half, matrix)
    for _ in range(_JACOBI_SWEEPS * (2 * half - 1)):
        twice_between, apart = (matrix.flatten(1) @ pairs).chunk(2, dim=1)
        # 0 / 0 is a pair that needs none.
        angle = 0.5 * (twice_between / apart).nan_to_num().atan()
        rotation = (torch.cat([angle.cos(), angle.sin()], dim=1) @ turn).view_as(matrix)
        matrix, vectors = rotation.mT.bmm(matrix).bmm(rotation), vectors.bmm(rotation)
    values = matrix.diagonal(dim1=1, dim2=2)
    if size % 2:
        # After whole sweeps every position is back in its seat.
        values, vectors = values[:, :-1], vectors[:, :-1, :-1]
    values, order = values.sort(dim=1, descending=True)
    return values, vectors.gather(2, order[:, None].expand_as(vectors))


# Some eighty rounds are most of what a map asks an accelerator's host for beside the backbone, so a round has few
# kernels: what it reads, and what it makes of its angles, are products with matrices of 0, 2 and +-1, and so exact.


def _pairs(half: int, like: Tensor) -> Tensor:
    """``(n * n, 2 * half)``: takes of a matrix, for each pair, twice what is between and how far its values differ."""
    each = torch.eye(half, dtype=like.dtype, device=like.device).diag_embed()
    none = torch.zeros_like(each)
    between = torch.cat([torch.cat([none, 2 * each], dim=2), torch.cat([none, none], dim=2)], dim=1)
    apart = torch.cat([torch.cat([each, none], dim=2), torch.cat([none, -each], dim=2)], dim=1)
    return torch.cat([between, apart]).flatten(1).mT


def _turn(half: int, like: Tensor) -> Tensor:
    """``(2 * half, n * n)``: makes of the cosines and sines of a round its rotation, and the move of all positions but
    the first to their next seats."""
    each = torch.eye(half, dtype=like.dtype, device=like.device).diag_embed()
    none = torch.zeros_like(each)
    cosine, sine = torch.cat([each, none]), torch.cat([none, each])
    top, bottom = torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)
    seats = [top[:, :, :1], bottom[:, :, :1], top[:, :, 1:-1], bottom[:, :, 1:], top[:, :, 1:][:, :, -1:]]
    return torch.cat(seats, dim=2).flatten(1)
