"""The rewards of an update's samples, and with step credit of the estimates of x0 along their chains."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vipo.credit import Costs
from vipo.credit.steps import clean_estimate, step_costs
from vipo.rewards import by_network, in_use, score
from vipo.training.learn import sampling_policy
from vipo.training.rollouts import Rollouts, decoded, in_order
from vipo.training.setup import Setup


@dataclass(frozen=True)
class Scores:
    """Rewards of all samples, by the label of their term, on the CPU; not finite where there is none.

    Attributes:
        rewards: ``(N,)``.
        steps: ``(N, S + 1)``, of the estimates of x0 before each transition, and of the sample; {} without step credit.
        costs: of those estimates, for each sample.
    """

    rewards: dict[str, Tensor]
    steps: dict[str, Tensor] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)


def score_samples(setup: Setup, rollouts: Rollouts) -> Scores:
    """Each reward of all samples."""
    return Scores(_scored(setup, rollouts, rollouts.pictures))


def score_transitions(setup: Setup, rollouts: Rollouts, scores: Scores) -> Scores:
    """With step credit, each reward of every estimate of x0 along the chains as well; the sample's own are known."""
    estimate, found = setup.config.credit.steps, []
    if estimate == "none":
        return scores
    for step in setup.chain.trainable:
        with sampling_policy(setup):
            estimates = [
                clean_estimate(
                    setup.generator,
                    batch.conditioning,
                    batch.trajectory,
                    setup.chain,
                    step,
                    stochastic=rollouts.stochastic,
                    estimate=estimate,
                )
                for batch in rollouts.batches
            ]
        found.append(_scored(setup, rollouts, decoded(setup, torch.cat(estimates))))
    found.append(scores.rewards)
    steps = {label: torch.stack([own[label] for own in found], dim=1) for label in setup.rewards}
    return replace(scores, steps=steps, costs=step_costs(estimate, setup.chain.steps, len(setup.rewards)))


def _scored(setup: Setup, rollouts: Rollouts, pictures: Tensor) -> dict[str, Tensor]:
    rewards = {label: torch.full((len(rollouts.samples),), torch.nan) for label in setup.rewards}
    rows, size = rollouts.rows, setup.config.training.reward_batch or setup.config.training.micro_batch
    for group in by_network(setup.rewards):
        with in_use(next(iter(group.values()))):
            for label, reward in group.items():
                for start, piece in zip(range(0, len(rows), size), pictures.split(size), strict=True):
                    part = rows[start : start + size]
                    own = [rollouts.samples[row] for row in part]
                    texts, metadata = [s.prompt.text for s in own], [s.prompt.metadata for s in own]
                    rewards[label][part] = score(label, reward, piece, texts, metadata)
    return {name: in_order(setup, values[rows], rollouts.batches).cpu() for name, values in rewards.items()}
