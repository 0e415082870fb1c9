"""Which sign of a principal direction means "important": the rules, and what each scores."""

from typing import Literal

import torch
from torch import Tensor

Orientation = Literal["norm", "centre", "border", "skew", "inverted_sklearn", "none"]


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
