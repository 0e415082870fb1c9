"""Transitions of the sampling chain: Gaussians with mean and standard deviation per element.

Flow matching: ``x_sigma = (1 - sigma) x0 + sigma noise``, velocity ``v = noise - x0``, a step goes from `sigma` down
to `sigma_next`. Noise-predicting diffusion: ``x = sqrt(alpha) x0 + sqrt(1 - alpha) noise`` with the cumulative
`alpha`, a step goes up to `alpha_next`. Every transition with `eta` 0 is the family's ODE step with std 0.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Channels = Literal["mean", "sum"]
Density = Literal["gaussian", "squared_error"]


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
        eta: g, at least 0.

    Returns:
        Mean like `latents`, and std ``(B, 1, ...)`` that broadcasts with it.

    Raises:
        ValueError: shapes disagree.

    Source: DanceGRPO (arXiv 2505.07818), the transition that ViPO trains.
    """
    _same_shape("velocity", velocity, latents)
    s, dt = _column("sigma", sigma, latents), _column("sigma_next", sigma - sigma_next, latents)
    drift = velocity + eta**2 / (2 * s) * (latents + (1 - s) * velocity)
    return latents - dt * drift, eta * dt.sqrt()


def flow_transition(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, *, sigma_second: float
) -> tuple[Tensor, Tensor]:
    """The reverse-SDE step with ``g = eta sqrt(sigma / (1 - sigma))``; shapes and errors as `dance_transition`.

    At sigma = 1 the denominator alone uses the schedule's second level: ``g = eta sqrt(1 / (1 - sigma_second))``.

    Source: Flow-GRPO (arXiv 2505.05470), equation 9 and its public code; eta 0.7 there.
    """
    _same_shape("velocity", velocity, latents)
    s, dt = _column("sigma", sigma, latents), _column("sigma_next", sigma - sigma_next, latents)
    variance = eta**2 * s / (1 - torch.where(s == 1, sigma_second, s))
    drift = velocity + variance / (2 * s) * (latents + (1 - s) * velocity)
    return latents - dt * drift, (variance * dt).sqrt()


def cps_transition(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """The coefficients-preserving step; shapes and errors as `dance_transition`, `eta` in [0, 1].

    ``mean = (1 - sigma') x0_hat + sqrt(sigma'^2 - s^2) noise_hat``, ``std = s = sigma' sin(eta pi / 2)``, with
    ``x0_hat = x - sigma v`` and ``noise_hat = x + (1 - sigma) v``: mean and noise together keep the schedule's level.

    Source: Flow-CPS (arXiv 2509.05952).
    """
    _same_shape("velocity", velocity, latents)
    s, s_next = _column("sigma", sigma, latents), _column("sigma_next", sigma_next, latents)
    std = s_next * math.sin(eta * math.pi / 2)
    clean, noise = latents - s * velocity, latents + (1 - s) * velocity
    return (1 - s_next) * clean + (s_next**2 - std**2).clamp_min(0).sqrt() * noise, std


def ddim_transition(
    latents: Tensor, noise: Tensor, alpha: Tensor, alpha_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """The DDIM step of a noise-predicting network.

    ``std = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')``, ``mean = sqrt(a') x0_hat + sqrt(1 - a' - std^2) noise``.

    Args:
        latents: ``(B, C, ...)`` float32, x at `alpha`.
        noise: the network's prediction, like `latents`.
        alpha: ``(B,)`` cumulative alpha in (0, 1).
        alpha_next: ``(B,)`` in (`alpha`, 1].
        eta: 0 (deterministic) to 1 (DDPM).

    Returns:
        Mean like `latents`, and std ``(B, 1, ...)`` that broadcasts with it.

    Raises:
        ValueError: shapes disagree.

    Source: DDIM (arXiv 2010.02502), equations 12 and 16, as DDPO (arXiv 2305.13301) trains it.
    """
    _same_shape("noise", noise, latents)
    a, a_next = _column("alpha", alpha, latents), _column("alpha_next", alpha_next, latents)
    clean = (latents - (1 - a).sqrt() * noise) / a.sqrt()
    return _ddim_step(clean, noise, a, a_next, eta)


def v_transition(latents: Tensor, v: Tensor, alpha: Tensor, alpha_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The DDIM step of a network that predicts ``v = sqrt(a) noise - sqrt(1 - a) x0``; as `ddim_transition`, but alpha
    may be 0.

    Source: Salimans and Ho (arXiv 2202.00512), appendix D.
    """
    _same_shape("v", v, latents)
    a, a_next = _column("alpha", alpha, latents), _column("alpha_next", alpha_next, latents)
    clean = a.sqrt() * latents - (1 - a).sqrt() * v
    return _ddim_step(clean, a.sqrt() * v + (1 - a).sqrt() * latents, a, a_next, eta)


def _ddim_step(clean: Tensor, noise: Tensor, a: Tensor, a_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    return a_next.sqrt() * clean + (1 - a_next - std**2).clamp_min(0).sqrt() * noise, std


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The ODE step of flow matching, ``x - (sigma - sigma') v``; to sigma' = 0 it is the estimate of x0."""
    _same_shape("velocity", velocity, latents)
    return latents - _column("sigma", sigma - sigma_next, latents) * velocity


def position_log_prob(
    value: Tensor, mean: Tensor, std: Tensor, channels: Channels = "mean", density: Density = "gaussian"
) -> Tensor:
    """Log-probability of `value` per position, channels reduced.

    Args:
        value, mean: ``(B, C, [T,] H, W)`` float32.
        std: broadcasts with `mean`, above 0.
        channels: mean over channels (DanceGRPO, Flow-GRPO), or their sum (the density of the whole position). The
            spread of its changes is ``sqrt(C)`` times smaller, or larger, than one element's.
        density: the Gaussian log-density, or ``-(value - mean)^2`` without the variance, which the public code of
            Flow-CPS uses in its place.

    Returns:
        ``(B, [T,] H, W)`` float32. Its mean over positions is the scalar log-probability of DanceGRPO
        and Flow-GRPO.

    Raises:
        ValueError: shapes disagree.
    """
    _same_shape("value", value, mean)
    element = -((value - mean) ** 2)
    if density == "gaussian":
        element = element / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return _over_channels(element, channels)


def position_kl(mean: Tensor, reference_mean: Tensor, std: Tensor, channels: Channels = "mean") -> Tensor:
    """KL divergence per position of two Gaussians of equal variance: ``(mean - reference)^2 / (2 std^2)``.

    Args:
        mean: ``(B, C, [T,] H, W)`` of the policy's transition, with its gradient.
        reference_mean: the reference policy's at the same latents, without.
        std: of both, broadcasts with `mean`.
        channels: mean (Flow-GRPO) or sum over channels.

    Returns:
        ``(B, [T,] H, W)``, at least 0.

    Raises:
        ValueError: shapes disagree.

    Source: Flow-GRPO (arXiv 2505.05470), equation 10.
    """
    _same_shape("reference_mean", reference_mean, mean)
    return _over_channels((mean - reference_mean) ** 2 / (2 * std**2), channels)


def _over_channels(element: Tensor, channels: Channels) -> Tensor:
    return element.mean(dim=1) if channels == "mean" else element.sum(dim=1)


def _same_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)} of the latents, got {tuple(value.shape)}")


def _column(name: str, values: Tensor, like: Tensor) -> Tensor:
    if values.shape != like.shape[:1]:
        raise ValueError(f"{name}: expected shape ({len(like)},) of the batch, got {tuple(values.shape)}")
    return values.reshape(-1, *([1] * (like.ndim - 1)))
