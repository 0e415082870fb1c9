"""The clipped surrogate with ratios per sample or per position (METHOD section 5)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Loss of one batch: ``loss`` scalar with gradient; ``clipped`` ``(B,)`` share of positions without gradient."""

    loss: Tensor
    clipped: Tensor


def normalized_log_ratio(log_ratio: Tensor, kl: Tensor, std: Tensor) -> Tensor:
    """The log-ratio with its negative mean taken out and its spread made the same at every step.

    For a transition drawn by the old policy, ``log rho = -|d|^2 / (2 std^2) + d . eps / std`` with the difference `d`
    of the two means: its mean is below 0 and its spread depends on the step. ``(log rho + |d|^2 / (2 std^2)) std``
    leaves ``d . eps``. Whatever the reductions over channels and positions, numerator and bias share them.

    Args:
        log_ratio: ``(B, [T,] H, W)``, from the Gaussian density.
        kl: like `log_ratio`, ``|d|^2 / (2 std^2)`` of the new and the old policy (`position_kl`), same reduction.
        std: ``(B,)`` of the transition.

    Raises:
        ValueError: shapes disagree.

    Source: GRPO-Guard (arXiv 2510.22319), ratio normalisation; per position it is ours.
    """
    if kl.shape != log_ratio.shape or std.shape != log_ratio.shape[:1]:
        raise ValueError(
            f"kl, std: expected shapes {tuple(log_ratio.shape)} and ({len(log_ratio)},) of log_ratio, "
            f"got {tuple(kl.shape)} and {tuple(std.shape)}"
        )
    return (log_ratio + kl) * std.reshape(-1, *([1] * (log_ratio.ndim - 1)))


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    ratio: Literal["sample", "position"],
    side: Literal["ppo", "symmetric", "none"],
    scope: Literal["sample", "position"],
    clip_range: float,
    weights: Tensor | None = None,
) -> Surrogate:
    """``L = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)`` over samples and positions.

    Args:
        log_ratio: ``(B, [T,] H, W)`` per position, ``logp_new(p) - logp_old(p)``, with its gradient.
        advantages: ``(B, [T,] H, W)`` per position (ratio 'position') or ``(B,)`` (ratio 'sample').
        ratio: 'position': ``rho^p = exp(log_ratio(p))``; 'sample': the ratio of the mean log-probability, one per
            sample (DanceGRPO, Flow-GRPO).
        side: 'ppo': the one-sided minimum, which drops the gradient where the ratio has already moved
            beyond the range in the advantage's direction; 'symmetric': drops it beyond the range on either
            side; 'none': never.
        scope: whether the sample's ratio or each position's own decides what is dropped.
        clip_range: eps, half-width of the accepted range.
        weights: ``(B,)`` factors on the samples' losses, or None.

    Raises:
        ValueError: shapes disagree.

    Source: PPO (arXiv 1707.06347) equation 7; ViPO (arXiv 2511.18719) for the form per position.
    """
    expected = log_ratio.shape if ratio == "position" else log_ratio.shape[:1]
    if advantages.shape != expected:
        raise ValueError(
            f"advantages: expected shape {tuple(expected)} for ratio {ratio!r}, got {tuple(advantages.shape)}"
        )
    sample_log_ratio = log_ratio.flatten(1).mean(dim=1)
    column = (-1, *([1] * (log_ratio.ndim - 1)))
    if ratio == "sample":
        rho, gate = sample_log_ratio.exp(), sample_log_ratio.detach().exp()
    else:
        rho = log_ratio.exp()
        gate = rho.detach() if scope == "position" else sample_log_ratio.detach().exp().reshape(column).expand_as(rho)
    above, below = gate > 1 + clip_range, gate < 1 - clip_range
    if side == "ppo":
        dropped = (above & (advantages > 0)) | (below & (advantages < 0))
    elif side == "symmetric":
        dropped = above | below
    else:
        dropped = torch.zeros_like(above)
    # The value at the bound, so that the loss is continuous in the ratio; it carries no gradient.
    bound = gate.clamp(1 - clip_range, 1 + clip_range)
    gained = torch.where(dropped, bound * advantages, rho * advantages)
    if weights is not None:
        if weights.shape != log_ratio.shape[:1]:
            raise ValueError(f"weights: expected shape ({len(log_ratio)},) of the batch, got {tuple(weights.shape)}")
        gained = gained * weights.reshape(-1, *([1] * (gained.ndim - 1)))
    clipped = dropped.flatten(1).float().mean(dim=1) if dropped.ndim > 1 else dropped.float()
    return Surrogate(-gained.mean(), clipped)
