"""Transitions of the sampling chain with Gaussian log-probabilities per position.

Convention: ``x_sigma = (1 - sigma) x0 + sigma noise``, velocity ``v = noise - x0``; a step goes from
`sigma` down to `sigma_next`.
"""

import math

import torch
from torch import Tensor


def dance_transition(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one reverse-SDE step with constant ``g = eta``.

    ``mean = x - dt (v + g^2 / (2 sigma) (x + (1 - sigma) v))``, ``std = g sqrt(dt)``, ``dt = sigma - sigma'``.

    Args:
        latents: ``(B, C, ...)`` float32, x at `sigma`.
        velocity: like `latents`.
        sigma: ``(B,)`` in (0, 1].
        sigma_next: ``(B,)``, below `sigma`.
        eta: g, above 0.

    Returns:
        Mean like `latents`, and std ``(B, 1, ...)`` that broadcasts with it.

    Raises:
        ValueError: shapes disagree.

    Source: DanceGRPO (arXiv 2505.07818), the transition that ViPO trains.
    """
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity: expected shape {tuple(latents.shape)} of latents, got {tuple(velocity.shape)}")
    s, dt = _column(sigma, latents), _column(sigma - sigma_next, latents)
    drift = velocity + eta**2 / (2 * s) * (latents + (1 - s) * velocity)
    return latents - dt * drift, eta * dt.sqrt()


def clean_estimate(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The chain's deterministic last step: ``x0 = x - sigma v``, shapes as in `dance_transition`."""
    return latents - _column(sigma, latents) * velocity


def position_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density of `value` per position: the mean over channels.

    Args:
        value, mean: ``(B, C, [T,] H, W)`` float32.
        std: broadcasts with `mean`, above 0.

    Returns:
        ``(B, [T,] H, W)`` float32. Its mean over positions is the scalar log-probability of DanceGRPO
        and Flow-GRPO.

    Raises:
        ValueError: shapes disagree.
    """
    if value.shape != mean.shape:
        raise ValueError(f"value: expected shape {tuple(mean.shape)} of mean, got {tuple(value.shape)}")
    density = -((value - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    if values.shape != like.shape[:1]:
        raise ValueError(f"sigma: expected shape ({len(like)},) of the batch, got {tuple(values.shape)}")
    return values.reshape(-1, *([1] * (like.ndim - 1)))
