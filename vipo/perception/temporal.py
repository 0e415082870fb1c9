"""Clips: maps averaged as the latent frames need them, and principal directions followed from frame to frame."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vipo.perception.allocator import smoothing_matrix


def follow_components(directions: Tensor, structured: Tensor) -> Tensor:
    """Signed permutations that put each frame's components in its predecessor's order and sign.

    Components are paired greedily by the magnitude of the cosine of their directions, each at most once: that undoes
    both a flip of sign and a swap of two components of similar variance. A frame without structure has no directions
    to follow and is skipped over.

    Args:
        directions: ``(B, T, K, d)``, of unit length.
        structured: ``(B, T)`` bool.

    Returns:
        ``(B, T, K, K)`` with one entry of 1 or -1 a row and column, 0 elsewhere; the first frame's is the identity.
    """
    batch, frames, count, _ = directions.shape
    identity = torch.eye(count, dtype=directions.dtype, device=directions.device).expand(batch, count, count)
    previous, seen, links = directions[:, 0], structured[:, 0], [identity]
    for frame in range(1, frames):
        cosines = previous @ directions[:, frame].mT
        link = torch.where((seen & structured[:, frame])[:, None, None], _signed_permutation(cosines), identity)
        links.append(link)
        previous = torch.where(structured[:, frame, None, None], link @ directions[:, frame], previous)
        seen = seen | structured[:, frame]
    return torch.stack(links, dim=1)


def _signed_permutation(cosines: Tensor) -> Tensor:
    strength, link = cosines.abs(), torch.zeros_like(cosines)
    for _ in range(cosines.shape[1]):
        best = strength.flatten(1).argmax(dim=1)
        chosen = torch.zeros_like(strength).flatten(1).scatter_(1, best[:, None], 1.0).view_as(strength)
        link = link + chosen * torch.where(cosines < 0, -1.0, 1.0)
        taken = chosen.amax(dim=1, keepdim=True) + chosen.amax(dim=2, keepdim=True)
        strength = torch.where(taken > 0, -1.0, strength)
    return link


def average_groups(maps: Tensor, groups: Sequence[range]) -> Tensor:
    """Mean of the maps ``(B, T, h, w)`` over each group of frames: ``(B, len(groups), h, w)``.

    Raises:
        ValueError: a group is empty or reaches outside the clip.
    """
    frames = maps.shape[1]
    for group in groups:
        if not group or min(group) < 0 or max(group) >= frames:
            raise ValueError(f"frame_groups: {group} is empty or outside the {frames} frames of the clip")
    if not groups:
        raise ValueError("frame_groups: give at least one")
    return torch.stack([maps[:, group.start : group.stop : group.step].mean(dim=1) for group in groups], dim=1)


def smooth_in_time(maps: Tensor, sigma: float) -> Tensor:
    """Smooth ``(B, T, h, w)`` along T as ``scipy.ndimage.gaussian_filter1d`` does; `sigma` 0 leaves it as it is."""
    if sigma == 0:
        return maps
    return torch.einsum("st,bthw->bshw", smoothing_matrix(maps.shape[1], sigma, maps), maps)


def consecutive_correlation(maps: Tensor) -> Tensor:
    """Pearson correlation over space of each map with its successor: 1 for a still map, -1 for one that inverts.

    Args:
        maps: ``(B, T, h, w)``, T >= 2.

    Returns:
        ``(B, T - 1)`` float64; NaN where a map is flat.
    """
    centred = maps.double().flatten(2)
    centred = centred - centred.mean(dim=2, keepdim=True)
    lengths = centred.norm(dim=2)
    return (centred[:, :-1] * centred[:, 1:]).sum(dim=2) / (lengths[:, :-1] * lengths[:, 1:])
