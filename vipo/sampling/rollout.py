"""Rollouts: whole chains with everything that the update needs, and plain ODE sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.config.sampling import Solver
from vipo.generators.base import Conditioning, Generator
from vipo.sampling.chain import Chain
from vipo.sampling.noise import Key, keyed_normal
from vipo.sampling.solvers import OdeSolver


@dataclass(frozen=True)
class Trajectory:
    """One batch of sampled chains of T steps.

    Attributes:
        latents: ``(B, T, C, [T_lat,] H, W)`` float32, the states that the network saw; transition t leads from
            ``latents[:, t]`` to ``latents[:, t + 1]``, for t up to T - 2.
        means: ``(B, T - 1, C, [T_lat,] H, W)`` float32, the mean of each of those transitions under the policy that
            sampled (of a deterministic one: the next state itself).
        clean: ``(B, C, [T_lat,] H, W)`` float32, the deterministic last step's estimate of x0.
    """

    latents: Tensor
    means: Tensor
    clean: Tensor

    def select(self, rows: Tensor) -> "Trajectory":
        """The chains of `rows`."""
        return Trajectory(self.latents[rows], self.means[rows], self.clean[rows])

    def at(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each chain's transition ``steps[b]``: where it starts, what was drawn, and the mean of that.

        Args:
            steps: ``(B,)`` int64 in [0, T - 2].

        Returns:
            Three of ``(B, C, [T_lat,] H, W)``.
        """
        rows = torch.arange(len(steps), device=steps.device)
        return self.latents[rows, steps], self.latents[rows, steps + 1], self.means[rows, steps]


@torch.no_grad()
def rollout(
    generator: Generator,
    conditioning: Conditioning,
    chain: Chain,
    stochastic: range,
    initial_keys: Sequence[Key],
    step_keys: Sequence[Key],
    solver: Solver = "euler",
    begun: Tensor | None = None,
) -> Trajectory:
    """Sample one batch by the chain; every draw is keyed by its sample.

    Args:
        generator: the current policy.
        conditioning: of the batch.
        chain: levels and transition.
        stochastic: the steps that draw noise; the others follow the ODE.
        initial_keys: one key per sample for the initial noise.
        step_keys: one key per sample; the step index is appended.
        solver: of the ODE.
        begun: ``(B, S + 1, C, [T_lat,] H, W)``, the states up to the first stochastic step S, where they are known:
            the chains go on from there.

    Raises:
        ValueError: the number of keys differs from the batch, or what is begun ends elsewhere.
    """
    if len(initial_keys) != len(step_keys):
        raise ValueError(f"step_keys: expected {len(initial_keys)} keys as initial_keys, got {len(step_keys)}")
    if begun is not None and begun.shape[:2] != (len(step_keys), stochastic.start + 1):
        raise ValueError(
            f"begun: expected {len(step_keys)} chains of {stochastic.start + 1} states, got {tuple(begun.shape[:2])}"
        )
    device = chain.levels.device
    states = [keyed_normal(initial_keys, generator.latent_shape, device)] if begun is None else list(begun.unbind(1))
    x, means, ode = states[-1], states[1:], OdeSolver(chain, solver)
    for step in chain.trainable[len(means) :]:
        prediction = generator.predict(x, chain.times[step].expand(len(x)), conditioning)
        if step in stochastic:
            mean, std = chain.gaussian(x, prediction, torch.full((len(x),), step, device=device))
            x = mean + std * keyed_normal([(*key, step) for key in step_keys], generator.latent_shape, device)
            ode.drawn()
        else:
            mean = x = ode.step(x, prediction, step)
        states.append(x)
        means.append(mean)
    last = chain.steps - 1
    clean = ode.step(x, generator.predict(x, chain.times[last].expand(len(x)), conditioning), last)
    return Trajectory(torch.stack(states, dim=1), torch.stack(means, dim=1), clean)


@torch.no_grad()
def ode_states(
    generator: Generator,
    conditioning: Conditioning,
    chain: Chain,
    until: int,
    initial_keys: Sequence[Key],
    solver: Solver = "euler",
) -> Tensor:
    """The first states of chains that draw no noise before step `until`, ``(B, until + 1, C, [T_lat,] H, W)``.

    Args:
        generator, conditioning, chain, initial_keys, solver: as of `rollout`.
        until: the step that the last state is at.
    """
    x = keyed_normal(initial_keys, generator.latent_shape, chain.levels.device)
    states, ode = [x], OdeSolver(chain, solver)
    for step in range(until):
        x = ode.step(x, generator.predict(x, chain.times[step].expand(len(x)), conditioning), step)
        states.append(x)
    return torch.stack(states, dim=1)


@torch.no_grad()
def sample_ode(generator: Generator, conditioning: Conditioning, chain: Chain, noise: Tensor) -> Tensor:
    """Deterministic sampling: every step of the chain follows the ODE.

    Args:
        noise: ``(B, *latent_shape)`` float32, x at the first level.

    Returns:
        Clean latents like `noise`.
    """
    x = noise
    for step in range(chain.steps):
        x = chain.ode(x, generator.predict(x, chain.times[step].expand(len(x)), conditioning), step)
    return x
