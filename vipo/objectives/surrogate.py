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


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    ratio: Literal["sample", "position"],
    side: Literal["ppo", "symmetric", "none"],
    scope: Literal["sample", "position"],
    clip_range: float,
) -> Surrogate:
    """``L = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)`` over samples and positions.

    Args:
        log_prob: ``(B, [T,] H, W)`` per position under the current policy.
        old_log_prob: the same under the policy that sampled, no gradient.
        advantages: ``(B, [T,] H, W)`` per position (ratio 'position') or ``(B,)`` (ratio 'sample').
        ratio: 'position': ``rho^p = exp(logp_new(p) - logp_old(p))``; 'sample': the ratio of the mean
            log-probability, one per sample (DanceGRPO, Flow-GRPO).
        side: 'ppo': the one-sided minimum, which drops the gradient where the ratio has already moved
            beyond the range in the advantage's direction; 'symmetric': drops it beyond the range on either
            side; 'none': never.
        scope: whether the sample's ratio or each position's own decides what is dropped.
        clip_range: eps, half-width of the accepted range.

    Raises:
        ValueError: shapes disagree.

    Source: PPO (arXiv 1707.06347) equation 7; ViPO (arXiv 2511.18719) for the form per position.
    """
    if old_log_prob.shape != log_prob.shape:
        raise ValueError(
            f"old_log_prob: expected shape {tuple(log_prob.shape)} of log_prob, got {tuple(old_log_prob.shape)}"
        )
    expected = log_prob.shape if ratio == "position" else log_prob.shape[:1]
    if advantages.shape != expected:
        raise ValueError(
            f"advantages: expected shape {tuple(expected)} for ratio {ratio!r}, got {tuple(advantages.shape)}"
        )
    log_ratio = log_prob - old_log_prob
    sample_log_ratio = log_ratio.flatten(1).mean(dim=1)
    column = (-1, *([1] * (log_prob.ndim - 1)))
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
    loss = -torch.where(dropped, bound * advantages, rho * advantages).mean()
    return Surrogate(loss, dropped.flatten(1).float().mean(dim=1) if dropped.ndim > 1 else dropped.float())
