"""The surrogate of policy gradients, with ratios per sample or per position, and a gate."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vipo.config.objective import SurrogateConfig
from vipo.objectives.advantages import Advantages
from vipo.objectives.gates import Gated, Moved, checked_gated, load_gate
from vipo.objectives.objective import Objective, Outcome, Points, Predictions, Share
from vipo.sampling.transitions import Channels, Density, position_kl, position_log_prob


class Surrogate(Objective):
    """``L = -mean rho A`` over samples and positions of a transition, outside of what the gate drops.

    Source: DanceGRPO (arXiv 2505.07818), Flow-GRPO (arXiv 2505.05470); ViPO (arXiv 2511.18719) per position.
    """

    needs = "log_probabilities"
    options: SurrogateConfig

    def __init__(self, options: SurrogateConfig) -> None:
        super().__init__(options)
        self.gate = load_gate(options.gate)

    @property
    def needs_reference(self) -> bool:
        """For its KL divergence."""
        return self.options.kl_weight > 0

    @property
    def only_advantages(self) -> bool:
        """Without that divergence."""
        return not self.needs_reference

    def points(self, share: Share) -> Points:
        """The state that the transition started from."""
        return Points(share.trajectory.at(share.steps)[0], share.chain.times[share.steps])

    def __call__(self, share: Share, points: Points, predictions: Predictions, advantages: Advantages) -> Outcome:
        """The loss of one transition a sample, and the KL divergence to the generator as it was."""
        options, chain, steps = self.options, share.chain, share.steps
        _, value, old_mean = share.trajectory.at(steps)
        mean, std = chain.gaussian(points.latents, predictions.new, steps)
        log_ratio = transition_log_ratio(value, mean, old_mean, std, options.channels, options.density)
        gated, weights = log_ratio, None
        if options.ratio_norm == "guard":
            kl = position_kl(mean, old_mean, std, options.channels)
            # GRPO-Guard's second half: a step's gradient is proportional to dt, this makes the steps count alike.
            weights = 1 / (chain.levels[steps] - chain.levels[steps + 1])
            gated = normalized_log_ratio(log_ratio, kl, std.flatten())
        values = advantages.values
        if options.ratio == "sample" and values.ndim > 1:
            # Credit without a layout: the same weight everywhere.
            values = values.flatten(1).mean(dim=1)
        moved = Moved(gated.detach(), values, mean.detach(), old_mean, std)
        decided = checked_gated(options.gate.name, self.gate(moved), moved)
        found = gated_surrogate(gated, values, decided, ratio=options.ratio, weights=weights)
        loss, metrics = found.loss, {}
        if predictions.reference is not None:
            reference, _ = chain.gaussian(points.latents, predictions.reference, steps)
            divergence = position_kl(mean, reference, std, options.channels).mean()
            loss, metrics = loss + options.kl_weight * divergence, {"kl": divergence.detach()}
        return Outcome(loss, log_ratio.detach(), gated.detach(), found.clipped, metrics)


def transition_log_ratio(
    value: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor, channels: Channels, density: Density
) -> Tensor:
    """``logp_new(p) - logp_old(p)`` of a transition, ``(B, [T,] H, W)`` with the gradient of `mean`; see
    `position_log_prob`."""
    new, old = (position_log_prob(value, each, std, channels, density) for each in (mean, old_mean))
    return new - old


@dataclass(frozen=True)
class GatedLoss:
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


def gated_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    gated: Gated,
    *,
    ratio: Literal["sample", "position"],
    weights: Tensor | None = None,
) -> GatedLoss:
    """``L = -mean rho A`` over samples and positions; where the gate drops, its ratio stands for rho.

    With the gate `ppo` that is ``-mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)``.

    Args:
        log_ratio: ``(B, [T,] H, W)`` per position, ``logp_new(p) - logp_old(p)``, with its gradient.
        advantages: ``(B, [T,] H, W)`` per position (ratio 'position') or ``(B,)`` (ratio 'sample').
        gated: what a gate decided of them.
        ratio: 'position': ``rho^p = exp(log_ratio(p))``; 'sample': the ratio of the mean log-probability, one per
            sample (DanceGRPO, Flow-GRPO).
        weights: ``(B,)`` factors on the samples' losses, or None.

    Raises:
        ValueError: shapes disagree.
    """
    expected = log_ratio.shape if ratio == "position" else log_ratio.shape[:1]
    if advantages.shape != expected:
        raise ValueError(
            f"advantages: expected shape {tuple(expected)} for ratio {ratio!r}, got {tuple(advantages.shape)}"
        )
    logs = log_ratio if ratio == "position" else log_ratio.flatten(1).mean(dim=1)
    # Without gradient before the exponential: its overflow times a gradient of 0 would be no number.
    rho = torch.where(gated.dropped, logs.detach(), logs).exp()
    # What is dropped has its value, so that the loss is continuous in the ratio, and no gradient.
    bound = rho.detach() if gated.ratio is None else gated.ratio
    gained = torch.where(gated.dropped, bound * advantages, rho * advantages)
    if weights is not None:
        if weights.shape != log_ratio.shape[:1]:
            raise ValueError(f"weights: expected shape ({len(log_ratio)},) of the batch, got {tuple(weights.shape)}")
        gained = gained * weights.reshape(-1, *([1] * (gained.ndim - 1)))
    dropped = gated.dropped
    clipped = dropped.flatten(1).float().mean(dim=1) if dropped.ndim > 1 else dropped.float()
    return GatedLoss(-gained.mean(), clipped)
