"""Step credit: how much of a sample's reward each transition of its chain made, as a signed advantage per step.

The reward of the estimate of x0 along the chain, ``r_0, ..., r_S`` (before the first transition, ..., after the last),
tells what each transition gained: ``r_(t+1) - r_t``, which sums to the whole chain's gain. Compared within the group,
step by step, it is an advantage of that transition alone.
"""

import torch
from torch import Tensor

from vipo.generators.base import Conditioning, Generator
from vipo.sampling.chain import Chain
from vipo.sampling.rollout import Trajectory


@torch.no_grad()
def clean_estimates(
    generator: Generator,
    conditioning: Conditioning,
    trajectory: Trajectory,
    chain: Chain,
    *,
    ode_steps: bool = False,
) -> Tensor:
    """The estimate of x0 before each transition, and the sample itself after the last: ``(B, S + 1, C, [T,] H, W)``.

    Args:
        generator: the policy that sampled.
        conditioning: of the batch.
        trajectory: T states, of which S = T - 1 transitions lead on.
        chain: as it was sampled by.
        ode_steps: False ('tweedie'): one network call a state gives ``x0_hat = E[x0 | x_t]``, T - 1 more calls in all
            (Stepwise-Flow-GRPO, arXiv 2603.28718); True ('ode'): the deterministic chain is followed to its end from
            every state, whose estimate is a sample and no mean, T (T - 1) / 2 more calls (DenseGRPO, arXiv 2601.20218).
    """
    found = []
    for start in range(chain.steps - 1):
        x = trajectory.latents[:, start]
        if ode_steps:
            for step in range(start, chain.steps):
                x = chain.ode(x, _predicted(generator, conditioning, chain, x, step), step)
        else:
            x = chain.ode(x, _predicted(generator, conditioning, chain, x, start), start, chain.steps)
        found.append(x)
    # The last state's estimate is the sample, in both.
    return torch.stack([*found, trajectory.clean], dim=1)


def step_advantages(rewards: Tensor, groups: Tensor, std_floor: float, clip: float) -> Tensor:
    """Signed advantages of the transitions: each one's gain, normalised within the group and the step.

    ``A_i,t = (d_i,t - mean_t) / (std_t + floor)`` with ``d_i,t = r_i,t+1 - r_i,t``, the group's mean and standard
    deviation (ddof 1) at that step.

    Args:
        rewards: ``(N, S + 1)`` of the estimates before each transition and of the sample; a sample with a value that
            is not finite is left out and gets 0.
        groups: ``(N,)`` int64 group index of each sample, from 0.
        std_floor: added to each standard deviation.
        clip: the advantages are clipped to [-clip, clip].

    Returns:
        ``(N, S)`` float32. At a step where all siblings gained as much, 0.

    Raises:
        ValueError: shapes disagree.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2 or groups.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards, groups: expected (N, S + 1) and (N,), got {tuple(rewards.shape)} and {tuple(groups.shape)}"
        )
    gains = rewards.double().diff(dim=1)
    valid = rewards.isfinite().all(dim=1)
    values = torch.zeros_like(gains)
    for group in groups.unique().tolist():
        members = (groups == group) & valid
        own = gains[members]
        if len(own) < 2:
            continue
        differs = (own != own[:1]).any(dim=0)
        normal = (own - own.mean(dim=0)) / (own.std(dim=0) + std_floor)
        values[members] = torch.where(differs, normal, 0.0)
    return values.clamp(-clip, clip).float()


def _predicted(generator: Generator, conditioning: Conditioning, chain: Chain, x: Tensor, step: int) -> Tensor:
    return generator.predict(x, chain.times[step].expand(len(x)), conditioning)
