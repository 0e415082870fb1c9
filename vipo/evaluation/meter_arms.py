"""The arms of a measurement: each one's way to place advantages, as training has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vipo.config.run import Config
from vipo.config.values import config_hash
from vipo.credit import Context, Costs, CreditSource, Samples, assign_credit, load_sources
from vipo.credit.meter.gradients import Chains
from vipo.credit.meter.subject import Group, Subject, chain_rewards
from vipo.credit.steps import Estimate, clean_estimate, step_costs
from vipo.objectives import allocate_advantages, best_and_worst, group_advantages, step_advantages


@dataclass(frozen=True)
class Arm:
    """One arm's way to place advantages, loaded.

    Attributes:
        config: the run that it belongs to.
        sources: of its credit, by name.
        key: what the sources depend on; arms that share it share them.
    """

    config: Config
    sources: Mapping[str, CreditSource]
    key: str


def load_arms(configs: Mapping[str, Config], context: Context) -> dict[str, Arm]:
    """Load and set up the sources of every arm, once for arms that share them.

    Args:
        configs: the arms by name.
        context: of all of them; each arm's own section `perception` takes its place.

    Raises:
        CreditError, PerceptionError: a source cannot be loaded, or cannot work with these samples.
    """
    arms: dict[str, Arm] = {}
    loaded: dict[str, Mapping[str, CreditSource]] = {}
    for name, config in configs.items():
        sections = {"credit": config.credit.model_dump(mode="json")["sources"]}
        key = config_hash(sections | {"perception": config.perception.model_dump(mode="json")})[:8]
        if key not in loaded:
            sources = load_sources(config.credit)
            for source in sources.values():
                source.set_up(replace(context, perception=config.perception))
            loaded[key] = sources
        arms[name] = Arm(config, loaded[key], key)
    return arms


@dataclass(frozen=True)
class Placement:
    """Where the arms place the advantages of one update.

    Attributes:
        values: by arm, ``(N, S or 1, [T,] H, W)``.
        costs: by arm, of each sample.
    """

    values: dict[str, Tensor]
    costs: dict[str, Costs]


def place_advantages(subject: Subject, arms: Mapping[str, Arm], groups: Sequence[Group]) -> Placement:
    """Each arm's advantages of the groups of one update, as training places them."""
    batches = [batch for group in groups for batch in group.batches]
    clean = torch.cat([batch.trajectory.clean for batch in batches])
    members = torch.arange(len(groups)).repeat_interleave(subject.group_size)
    rewards = chain_rewards(subject, batches)
    estimated: dict[str, dict[str, Tensor]] = {}
    pictures = torch.cat([subject.generator.pictures(batch.trajectory.clean) for batch in batches])
    samples = Samples(
        pictures=pictures,
        clean=clean,
        groups=members.to(clean.device),
        prompts=[group.prompt for group in groups for _ in range(subject.group_size)],
        numbers=list(range(subject.group_size)) * len(groups),
        frame_groups=subject.generator.frame_groups,
        trajectories=[batch.trajectory for batch in batches],
        batch=subject.micro_batch,
        seed=subject.seed,
        update=1 + groups[0].number // len(groups),
    )
    found, costs = {}, {}
    for name, arm in arms.items():
        seen = {
            source: [given for group in groups for given in group.seen[f"{arm.key}/{source}"]] for source in arm.sources
        }
        config, section = arm.config.advantages, arm.config.credit
        credit = assign_credit(arm.sources, samples, section.control, seen, section.mixture)
        weights, costs[name] = credit.weights, credit.costs
        options = (subject.weights, members, config.std_floor, config.clip, config.std)
        if section.steps != "none":
            costs[name] += step_costs(section.steps, subject.chain.steps, len(rewards))
            if section.steps not in estimated:
                estimated[section.steps] = _step_rewards(subject, batches, rewards, section.steps)
            values = step_advantages(estimated[section.steps], *options, combine=config.combine).values
        else:
            credit_of = weights.cpu() if weights is not None and section.multiplies == "reward" else None
            values = group_advantages(rewards, *options, credit_of, config.combine).values
        if (count := arm.config.training.best_of) is not None:
            values = _of_best_and_worst(values, members, count)
        values = values.to(clean.device)
        if weights is not None and section.multiplies == "advantage":
            if values.ndim == 2 and weights.ndim < clean.ndim:
                weights = weights.unsqueeze(1)
            values = allocate_advantages(values, weights)
        if values.ndim <= 2:
            values = values.reshape(*values.shape, *([1] * len(samples.positions)))
        # Where transitions have weights of their own there is a dimension more: that of the channels.
        found[name] = values if values.ndim == clean.ndim else values.unsqueeze(1)
    return Placement(found, costs)


def _of_best_and_worst(values: Tensor, members: Tensor, count: int) -> Tensor:
    """Zero but for those that are learned from, whose mean the mean over all then is."""
    scalar = values.flatten(1).mean(dim=1) if values.ndim > 1 else values
    rows = best_and_worst(scalar, members, count).flatten()
    kept = torch.zeros_like(values)
    kept[rows] = values[rows] * (len(values) / len(rows))
    return kept


def _step_rewards(
    subject: Subject, batches: Sequence[Chains], final: Mapping[str, Tensor], estimate: Estimate
) -> dict[str, Tensor]:
    """Each term of the estimates of x0 before every transition, and of the samples, ``(N, S + 1)``."""
    found = []
    for step in subject.chain.trainable:
        estimates = [
            clean_estimate(
                subject.generator,
                batch.conditioning,
                batch.trajectory,
                subject.chain,
                step,
                stochastic=subject.stochastic,
                estimate=estimate,
            )
            for batch in batches
        ]
        at_step = [
            replace(batch, trajectory=replace(batch.trajectory, clean=clean))
            for batch, clean in zip(batches, estimates, strict=True)
        ]
        found.append(chain_rewards(subject, at_step))
    return {name: torch.stack([*(own[name] for own in found), final[name]], dim=1) for name in final}
