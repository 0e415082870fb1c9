"""Rollouts: whole chains with everything that the update needs, and plain ODE sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.generators.base import Conditioning, Generator
from vipo.sampling.noise import Key, keyed_normal
from vipo.sampling.transitions import clean_estimate, dance_transition, position_log_prob


@dataclass(frozen=True)
class Trajectory:
    """One batch of sampled chains of T steps.

    Attributes:
        latents: ``(B, T, C, H, W)`` float32, the states that the network saw; transition t leads from
            ``latents[:, t]`` to ``latents[:, t + 1]``, for t up to T - 2.
        log_probs: ``(B, T - 1, H, W)`` float32 per position, of those transitions.
        clean: ``(B, C, H, W)`` float32, the deterministic last step's estimate of x0.
    """

    latents: Tensor
    log_probs: Tensor
    clean: Tensor


@torch.no_grad()
def rollout(
    generator: Generator,
    conditioning: Conditioning,
    sigmas: Tensor,
    eta: float,
    initial_keys: Sequence[Key],
    step_keys: Sequence[Key],
) -> Trajectory:
    """Sample one batch by the stochastic chain; every draw is keyed by its sample.

    Args:
        generator: the current policy.
        conditioning: of the batch.
        sigmas: ``(T + 1,)`` noise levels, 1 to 0.
        eta: g of the transition.
        initial_keys: one key per sample for the initial noise.
        step_keys: one key per sample; the step index is appended.

    Raises:
        ValueError: the number of keys differs from the batch.
    """
    if len(initial_keys) != len(step_keys):
        raise ValueError(f"step_keys: expected {len(initial_keys)} keys as initial_keys, got {len(step_keys)}")
    device = sigmas.device
    steps = len(sigmas) - 1
    x = keyed_normal(initial_keys, generator.latent_shape, device)
    states, log_probs = [x], []
    for step in range(steps - 1):
        sigma, sigma_next = sigmas[step].expand(len(x)), sigmas[step + 1].expand(len(x))
        velocity = generator.predict(x, sigma, conditioning)
        mean, std = dance_transition(x, velocity, sigma, sigma_next, eta)
        noise = keyed_normal([(*key, step) for key in step_keys], generator.latent_shape, device)
        x = mean + std * noise
        states.append(x)
        log_probs.append(position_log_prob(x, mean, std))
    sigma = sigmas[steps - 1].expand(len(x))
    clean = clean_estimate(x, generator.predict(x, sigma, conditioning), sigma)
    return Trajectory(torch.stack(states, dim=1), torch.stack(log_probs, dim=1), clean)


def transition_log_prob(
    generator: Generator, conditioning: Conditioning, trajectory: Trajectory, steps: Tensor, sigmas: Tensor, eta: float
) -> Tensor:
    """Log-probability per position ``(B, H, W)`` of each sample's transition ``steps[b]`` under the current policy.

    Args:
        steps: ``(B,)`` int64 transition indices in [0, T - 2], one per sample.
    """
    rows = torch.arange(len(steps), device=steps.device)
    x, x_next = trajectory.latents[rows, steps], trajectory.latents[rows, steps + 1]
    sigma, sigma_next = sigmas[steps], sigmas[steps + 1]
    velocity = generator.predict(x, sigma, conditioning)
    mean, std = dance_transition(x, velocity, sigma, sigma_next, eta)
    return position_log_prob(x_next, mean, std)


@torch.no_grad()
def sample_ode(generator: Generator, conditioning: Conditioning, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Deterministic Euler sampling of the probability-flow ODE.

    Args:
        noise: ``(B, C, H, W)`` float32, x at sigma 1.

    Returns:
        Clean latents like `noise`.
    """
    x = noise
    for step in range(len(sigmas) - 1):
        velocity = generator.predict(x, sigmas[step].expand(len(x)), conditioning)
        x = x + (sigmas[step + 1] - sigmas[step]) * velocity
    return x
