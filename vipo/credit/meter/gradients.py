"""The two gradients that the meter compares: of the expected reward through the chain, and of an update.

Both are asked of chains that `vipo.sampling.rollout.rollout` sampled, one step at a time: nothing but the states is
kept, so that memory is that of one network call, however long the chain is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vipo.credit.reward import differentiated, reward_gradient
from vipo.credit.source import CreditError
from vipo.errors import VipoError
from vipo.generators.base import Conditioning, Generator
from vipo.rewards import Reward
from vipo.rewards.resident import in_use
from vipo.sampling.chain import Chain
from vipo.sampling.rollout import Trajectory
from vipo.sampling.transitions import Channels, Density, position_log_prob


class MeterError(VipoError):
    """What the meter was asked cannot be measured; the message names the key and the fix."""


@dataclass(frozen=True)
class Chains:
    """One batch of sampled chains.

    Attributes:
        rows: which samples of the group they are.
        conditioning: of the batch.
        trajectory: the chains.
        texts, metadata: of their prompts, for the rewards.
    """

    rows: tuple[int, ...]
    conditioning: Conditioning
    trajectory: Trajectory
    texts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]


def total_gradient(
    generator: Generator, chains: Chains, rewards: Mapping[str, Reward], weights: Mapping[str, float]
) -> Tensor:
    """Of each sample's weighted sum of rewards, the gradient by its clean latents, like them.

    Terms of weight 0 are measured and not rewarded: of them no gradient is asked.

    Args:
        rewards, weights: by the label of their term.

    Raises:
        MeterError: a reward, or the decoder, hands no gradient on.
    """
    total = torch.zeros_like(chains.trajectory.clean)
    for name, reward in rewards.items():
        if weights[name] == 0:
            continue
        placed = differentiated(name, reward, chains.texts, chains.metadata)
        try:
            with in_use(reward):
                _, own = reward_gradient(generator, chains.trajectory.clean, placed, f"reward {name!r}")
        except CreditError as error:
            raise MeterError(
                f"{error}; set experiment.meter.reference=0 for the directional estimator alone"
            ) from error
        total += weights[name] * own
    return total


def pathwise_gradients(
    generator: Generator,
    chains: Chains,
    chain: Chain,
    stochastic: range,
    parameters: Sequence[nn.Parameter],
    clean_gradient: Tensor,
) -> Iterator[tuple[int, list[Tensor]]]:
    """The gradient of ``mean over the batch of r(x0)`` at fixed noise, step by step from the last to the first.

    The reverse sweep by hand: with ``a_T`` the reward's gradient by x0, step t adds ``a_(t+1) . d x_(t+1) / d theta``
    and hands on ``a_t = a_(t+1) . d x_(t+1) / d x_t``. The sum over the steps is the gradient through the whole chain.

    Args:
        generator: the policy that sampled, its `parameters` requiring gradients.
        chains: sampled by it.
        chain, stochastic: as they were sampled by.
        parameters: by which the gradient is taken.
        clean_gradient: of each sample's reward by its own clean latents, like them.

    Yields:
        The step, and what it adds, one tensor a parameter.
    """
    adjoint, states = clean_gradient / len(clean_gradient), chains.trajectory.latents
    for step in reversed(range(chain.steps)):
        with torch.enable_grad():
            latents = states[:, step].detach().requires_grad_(True)
            prediction = generator.predict(latents, chain.times[step].expand(len(latents)), chains.conditioning)
            if step in stochastic:
                # The noise that is added is fixed, and so is its scale.
                following, _ = chain.gaussian(latents, prediction, _everywhere(step, latents))
            else:
                following = chain.ode(latents, prediction, step)
            adjoint, *own = torch.autograd.grad(following, [latents, *parameters], adjoint, materialize_grads=True)
        yield step, list(own)


def update_gradients(
    generator: Generator,
    chains: Chains,
    chain: Chain,
    step: int,
    parameters: Sequence[nn.Parameter],
    advantages: Mapping[str, Tensor],
    *,
    channels: Channels = "mean",
    density: Density = "gaussian",
) -> Iterator[tuple[str, list[Tensor]]]:
    """What one transition adds to an update's direction, for each way to place its advantages.

    ``g = mean over samples and positions of A_i(p) grad logp_i(p)``: minus the gradient of the clipped surrogate where
    every ratio is 1, which is where an update begins. One network call serves all sources; each takes a backward pass.

    Args:
        generator, chains, chain, parameters: as of `pathwise_gradients`.
        step: the transition, a stochastic one.
        advantages: by source, signed, ``(B, [T,] H, W)`` or ``(B, 1, ...)``: the sample's advantage times its credit.
        channels, density: of the log-probability.

    Yields:
        The source, and its gradient, one tensor a parameter.
    """
    with torch.enable_grad():
        latents, following = (chains.trajectory.latents[:, place] for place in (step, step + 1))
        prediction = generator.predict(latents, chain.times[step].expand(len(latents)), chains.conditioning)
        mean, std = chain.gaussian(latents, prediction, _everywhere(step, latents))
        log_prob = position_log_prob(following, mean, std, channels, density)
        last = list(advantages)[-1]
        for name, own in advantages.items():
            pull = own.expand_as(log_prob) / log_prob.numel()
            yield (
                name,
                list(
                    torch.autograd.grad(log_prob, parameters, pull, retain_graph=name != last, materialize_grads=True)
                ),
            )


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """One vector ``(P,)`` of tensors, float32."""
    return torch.cat([gradient.reshape(-1).float() for gradient in gradients])


def _everywhere(step: int, latents: Tensor) -> Tensor:
    return torch.full((len(latents),), step, device=latents.device)
