"""Step credit: how much of a sample's reward each transition of its chain made.

The reward of the estimate of x0 along the chain, ``r_0, ..., r_S`` (before the first transition, ..., after the last),
tells what each transition gained: ``r_(t+1) - r_t``, which sums to the whole chain's gain. Compared within the group,
step by step, it is a signed advantage of that transition alone (`vipo.objectives.step_advantages`).
"""

from typing import Literal

import torch
from torch import Tensor

from vipo.credit.costs import Costs
from vipo.generators.base import Conditioning, Generator
from vipo.sampling.chain import Chain
from vipo.sampling.rollout import Trajectory

Estimate = Literal["tweedie", "ode"]


@torch.no_grad()
def clean_estimate(
    generator: Generator,
    conditioning: Conditioning,
    trajectory: Trajectory,
    chain: Chain,
    start: int,
    *,
    stochastic: range,
    estimate: Estimate,
) -> Tensor:
    """The estimate of x0 before transition `start`, ``(B, C, [T,] H, W)``; after the last one it is the sample.

    Args:
        generator: the policy that sampled.
        conditioning: of the batch.
        trajectory: T states, of which S = T - 1 transitions lead on.
        chain: as it was sampled by.
        start: in [0, S).
        stochastic: the steps that drew noise.
        estimate: 'tweedie': ``x0_hat = E[x0 | x_t]`` by the prediction that was sampled with, no network call
            (Stepwise-Flow-GRPO, arXiv 2603.28718); 'ode': the deterministic chain is followed to its end from the
            state, whose estimate is a sample and no mean, ``T - 1 - start`` calls (DenseGRPO, arXiv 2601.20218).
    """
    x = trajectory.latents[:, start]
    prediction = sampled_prediction(trajectory, chain, start, stochastic)
    if estimate == "tweedie":
        return chain.ode(x, prediction, start, chain.steps)
    x = chain.ode(x, prediction, start)
    for step in range(start + 1, chain.steps):
        x = chain.ode(x, generator.predict(x, chain.times[step].expand(len(x)), conditioning), step)
    return x


def sampled_prediction(trajectory: Trajectory, chain: Chain, step: int, stochastic: range) -> Tensor:
    """What the network predicted at a state, to rounding: every transition's mean is affine in the prediction."""
    x = trajectory.latents[:, step]
    where = torch.full((len(x),), step, device=x.device)

    def mean(latents: Tensor, prediction: Tensor) -> Tensor:
        if step in stochastic:
            return chain.gaussian(latents, prediction, where)[0]
        return chain.ode(latents, prediction, step)

    nothing = torch.zeros_like(x)
    return (trajectory.means[:, step] - mean(x, nothing)) / mean(nothing, torch.ones_like(x))


def step_costs(estimate: Estimate, steps: int, rewards: int) -> Costs:
    """Of each sample's estimates over a chain of `steps` steps, scored by `rewards` rewards."""
    calls = steps * (steps - 1) // 2 if estimate == "ode" else 0
    return Costs(network_calls=calls, decodes=steps - 1, reward_calls=(steps - 1) * rewards)
