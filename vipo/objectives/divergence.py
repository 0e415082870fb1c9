"""The gate of Flow-DPPO: the exact KL divergence of two Gaussian transitions decides, not a drawn ratio."""

from typing import Literal

import torch
from torch import Tensor

from vipo.config.objective import DivergenceGateConfig
from vipo.objectives.gates import Gate, Gated, Moved
from vipo.sampling.transitions import position_kl


class DivergenceGate(Gate):
    """Drops what has gone far from the policy that sampled and would go further; it counts as 0 in the loss.

    Source: Flow-DPPO (arXiv 2606.11025) and its public code; per position it is ours.
    """

    options: DivergenceGateConfig

    def __call__(self, moved: Moved) -> Gated:
        """By the divergence of the transition's two Gaussians."""
        kl = position_kl(moved.mean, moved.old_mean, moved.std)
        options, log_ratio = self.options, moved.log_ratio
        dropped = divergence_mask(log_ratio, kl, moved.advantages, scope=options.scope, bound=options.bound)
        return Gated(dropped, torch.zeros_like(moved.advantages))


def divergence_mask(
    log_ratio: Tensor, kl: Tensor, advantages: Tensor, *, scope: Literal["sample", "position"], bound: float
) -> Tensor:
    """What loses its gradient: it has gone far from the policy that sampled, and would go further.

    ``KL >= bound`` and (``rho > 1`` and ``A > 0``, or ``rho < 1`` and ``A < 0``). What is far and comes back keeps
    its gradient, and so does everything near, whatever its ratio.

    The divergence has the same scale in both scopes, since a sample's is the mean over its positions, and none is
    below 0: one bound serves both, which no clip range of a ratio does.

    Args:
        log_ratio: ``(B, [T,] H, W)``, ``logp_new(p) - logp_old(p)`` of one transition.
        kl: like `log_ratio`, ``mean over channels of (mean_new - mean_old)^2 / (2 std^2)`` (`position_kl`). The
            published code takes the mean over all elements, the paper's equation their sum: a bound for the sum is
            this one times the number of elements.
        advantages: ``(B,)``, or ``(B, [T,] H, W)``.
        scope: 'sample': the means of both over the sample's positions decide, per transition as published;
            'position': each position's own (ours).
        bound: 1e-5 in the authors' code (UniRL, SD3.5 with eta .7), 1e-6 in Flow-Factory.

    Returns:
        Bool, like `advantages`.

    Raises:
        ValueError: shapes disagree, or scope 'position' without advantages per position.

    Source: Flow-DPPO (arXiv 2606.11025), equations 14 and 18, and its public code.
    """
    if kl.shape != log_ratio.shape:
        raise ValueError(f"kl: expected shape {tuple(log_ratio.shape)} of log_ratio, got {tuple(kl.shape)}")
    allowed = [log_ratio.shape] if scope == "position" else [log_ratio.shape, log_ratio.shape[:1]]
    if advantages.shape not in allowed:
        raise ValueError(
            f"advantages: expected shape {' or '.join(str(tuple(shape)) for shape in allowed)} for scope {scope!r}, "
            f"got {tuple(advantages.shape)}"
        )
    moved, divergence = log_ratio.detach().float(), kl.detach().float()
    if scope == "sample":
        column = (-1, *([1] * (advantages.ndim - 1)))
        moved, divergence = (values.flatten(1).mean(dim=1).reshape(column) for values in (moved, divergence))
    further = ((moved > 0) & (advantages > 0)) | ((moved < 0) & (advantages < 0))
    return (divergence >= bound) & further
