"""One update, as the algorithm reads: roll out -> score -> credit -> advantages -> learn.

An update samples ``prompts_per_update x group_size`` trajectories with the current policy, decodes and scores them,
says where in each of them its advantage goes, and takes ``optimizer_steps_per_update`` steps on the objective. Samples
are in the order ``(optimizer step, prompt, sample)``, so that every step holds the same share of every group, and the
micro-batches of the rollout are those of learning: the same network calls, hence ratios of exactly one.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.demo.scenes import object_coverage
from vipo.generators.embeddings import stack_conditioning
from vipo.objectives import GroupAdvantages, allocate_advantages, best_and_worst, group_advantages, weight_maps
from vipo.perception import AllocationMaps
from vipo.perception.allocator import finish
from vipo.rewards import RewardError, in_use, score
from vipo.sampling.chain import stochastic_steps
from vipo.sampling.noise import Key, keyed_generator
from vipo.sampling.rollout import rollout
from vipo.training.learn import learn
from vipo.training.samples import (
    MicroBatch,
    Sample,
    arrange_samples,
    chosen_transitions,
    concatenated,
    update_prompts,
)
from vipo.training.setup import Setup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollouts:
    """What an update sampled.

    Attributes:
        samples: all N of the update, in their order.
        groups: ``(N,)`` int64, the group of each sample.
        batches: this process's micro-batches; each knows the rows of its samples.
    """

    samples: list[Sample]
    groups: Tensor
    batches: list[MicroBatch]


@dataclass(frozen=True)
class Credit:
    """Where the advantage of each sample goes.

    Attributes:
        weights: ``(N, [T,] H, W)`` float32, non-negative; None: nowhere in particular, the advantage is a scalar.
        metrics: what is logged of them.
    """

    weights: Tensor | None
    metrics: dict[str, float]


def update(setup: Setup, number: int, stop_if_asked: Callable[[int], None] = lambda finished: None) -> dict[str, float]:
    """One update of the policy.

    Args:
        setup: the run.
        number: which update, from 1; with the seed it keys every draw.
        stop_if_asked: called between micro-batches with the number of the last finished update; may raise.

    Returns:
        The update's metrics: deterministic values only.

    Raises:
        RewardError: a reward raised, or no sample has a finite one.
        TrainingError: the policy is not the one that sampled, or a gradient is not finite.
    """
    setup.distribution.at(number)
    rollouts, pictures = roll_out(setup, number, stop_if_asked)
    with setup.timer("reward"):
        rewards = score_samples(setup, rollouts, pictures)
    with setup.timer("map"):
        credit = assign_credit(setup, rollouts, pictures, number)
    # The pictures of an update are many, and learning is where memory peaks.
    del pictures
    scalar = form_advantages(setup, rollouts, rewards, credit, number)
    metrics = reward_metrics(setup, rewards, scalar) | credit.metrics
    advantages = scalar.values.to(setup.device)
    if credit.weights is not None and setup.config.objective.map_on == "advantage":
        advantages = allocate_advantages(advantages, credit.weights)
    batches, samples = select_samples(setup, rollouts, scalar.values), rollouts.samples
    # With best_of, the trajectories that nothing is learned from.
    del rollouts
    with setup.timer("learn"):
        return metrics | learn(setup, batches, advantages, samples, number)


def roll_out(
    setup: Setup, number: int, stop_if_asked: Callable[[int], None] = lambda finished: None
) -> tuple[Rollouts, list[Tensor]]:
    """Sample this process's share of the update, and decode it.

    Returns:
        The rollouts, and of each of their batches the pictures ``(b, *sample_shape)`` in [0, 1].
    """
    config, size = setup.config, setup.config.training.micro_batch
    samples = arrange_samples(
        update_prompts(setup.prompts, config.seed, number, config.training.prompts_per_update),
        config.training.group_size,
        config.training.optimizer_steps_per_update,
    )
    stochastic = stochastic_steps(config.sampling.window, len(setup.chain.trainable), config.seed, number)
    transitions = chosen_transitions(samples, config.training, stochastic, config.seed, number).to(setup.device)
    batches, pictures = [], []
    for position, start in enumerate(range(0, len(samples), size)):
        if position % setup.distribution.data_processes != setup.distribution.data_rank:
            continue
        stop_if_asked(number - 1)
        chunk = samples[start : start + size]
        conditioning = stack_conditioning(setup.embeddings, [sample.prompt.id for sample in chunk])
        initial: list[Key] = [
            (config.seed, "initial", number, s.prompt.id, -1 if config.sampling.same_initial_noise else s.index)
            for s in chunk
        ]
        steps: list[Key] = [(config.seed, "step", number, s.prompt.id, s.index) for s in chunk]
        with setup.timer("rollout"):
            trajectory = rollout(setup.generator, conditioning, setup.chain, stochastic, initial, steps)
        rows = tuple(range(start, start + len(chunk)))
        batches.append(MicroBatch(rows, conditioning, trajectory, transitions[start : start + size]))
        with setup.timer("decode"):
            pictures.append(setup.generator.pictures(trajectory.clean))
    groups = torch.tensor([sample.group for sample in samples])
    return Rollouts(samples, groups, batches), pictures


def score_samples(setup: Setup, rollouts: Rollouts, pictures: list[Tensor]) -> dict[str, Tensor]:
    """Each reward of all samples, ``(N,)`` on the CPU, by the label of its term."""
    rewards = {label: torch.full((len(rollouts.samples),), torch.nan) for label in setup.rewards}
    for label, reward in setup.rewards.items():
        with in_use(reward):
            for batch, own_pictures in zip(rollouts.batches, pictures, strict=True):
                own = [rollouts.samples[row] for row in batch.rows]
                texts, metadata = [s.prompt.text for s in own], [s.prompt.metadata for s in own]
                rewards[label][list(batch.rows)] = score(label, reward, own_pictures, texts, metadata)
    rows = [row for batch in rollouts.batches for row in batch.rows]
    return {name: in_order(setup, values[rows], rollouts.batches).cpu() for name, values in rewards.items()}


def in_order(setup: Setup, local: Tensor, batches: list[MicroBatch]) -> Tensor:
    """Values ``(n, ...)`` of this process's samples, gathered to ``(N, ...)`` in the order of all samples."""
    return setup.distribution.in_order(local, [row for batch in batches for row in batch.rows])


def assign_credit(setup: Setup, rollouts: Rollouts, pictures: list[Tensor], number: int) -> Credit:
    """Where in each sample its advantage goes, and what the metrics say of it."""
    kind, batches = setup.config.objective.map, rollouts.batches
    if kind == "none":
        return Credit(None, {})
    found = [_source_maps(setup, own) for own in pictures]
    # After the last batch: on an accelerator, reading a flag waits for everything before it.
    for part in found:
        part.check()
    maps = in_order(setup, torch.cat([part.maps for part in found]), batches)
    constant = in_order(setup, torch.cat([part.constant for part in found]), batches)
    converged = in_order(setup, torch.cat([part.converged for part in found]), batches)
    permutations = None
    if kind == "shuffled":
        positions = maps[0].numel()
        keys: list[Key] = [(setup.config.seed, "shuffle", number, s.prompt.id, s.index) for s in rollouts.samples]
        drawn = [torch.randperm(positions, generator=keyed_generator(*key)) for key in keys]
        permutations = torch.stack(drawn).to(maps.device)
    groups, normalize = rollouts.groups.to(maps.device), setup.config.perception.normalize
    weights = weight_maps(kind, maps, constant, normalize, groups, permutations)
    return Credit(
        weights,
        {
            "map/mean": float(weights.mean()),
            "map/entropy": float(map_entropy(weights).mean()),
            "map/constant_share": float(constant.float().mean()),
            "map/unconverged_share": float((~converged).float().mean()),
        },
    )


def _source_maps(setup: Setup, images: Tensor) -> AllocationMaps:
    size = setup.generator.grid
    if setup.structuring is not None:
        return setup.structuring(images, size, setup.generator.frame_groups)
    if setup.config.objective.map == "oracle":
        coverage, perception = object_coverage(images, size), setup.config.perception
        constant = coverage.amax(dim=(1, 2)) == 0
        maps = finish(
            coverage,
            constant,
            torch.ones_like(constant),
            normalize=perception.normalize,
            exponent=perception.exponent,
            floor=perception.floor,
        )
    else:
        maps = torch.ones(len(images), *setup.generator.latent_shape[1:], device=images.device)
        constant = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    sound = torch.ones_like(constant)
    return AllocationMaps(maps, constant, sound, sound)


def map_entropy(maps: Tensor) -> Tensor:
    """Entropy of each map as a distribution over positions, relative to the uniform one: ``(N,)`` in [0, 1]."""
    flat = maps.flatten(1).double()
    share = flat / flat.sum(dim=1, keepdim=True)
    return -(torch.special.xlogy(share, share).sum(dim=1) / math.log(flat.shape[1])).float()


def form_advantages(
    setup: Setup, rollouts: Rollouts, rewards: dict[str, Tensor], credit: Credit, number: int
) -> GroupAdvantages:
    """Rewards to advantages by the statistics of each group; samples without a finite reward are left out and told.

    Raises:
        RewardError: no sample has a finite reward.
    """
    objective = setup.config.objective
    result = group_advantages(
        rewards,
        {term.label: term.weight for term in setup.config.reward.terms},
        rollouts.groups,
        objective.std_floor,
        objective.advantage_clip,
        objective.std,
        credit.weights.cpu() if credit.weights is not None and objective.map_on == "reward" else None,
    )
    if not bool(result.valid.any()):
        raise RewardError(f"update {number}: no sample has a finite reward; check the rewards {', '.join(rewards)}")
    for row in torch.nonzero(~result.valid).flatten().tolist():
        log.warning(
            "update %d: sample %d of %r left out, its reward is not finite",
            number,
            rollouts.samples[row].index,
            rollouts.samples[row].prompt.text,
        )
    return result


def reward_metrics(setup: Setup, rewards: dict[str, Tensor], advantages: GroupAdvantages) -> dict[str, float]:
    """What is logged of an update's rewards and of its groups."""
    weights, valid = {term.label: term.weight for term in setup.config.reward.terms}, advantages.valid
    total = torch.stack([weights[name] * values.double() for name, values in rewards.items()]).sum(dim=0)[valid]
    metrics = {
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std(correction=0)),
        "samples/invalid": float((~valid).sum()),
    }
    metrics |= {f"reward/{name}/mean": float(values.double()[valid].mean()) for name, values in rewards.items()}
    metrics["group/std"] = float(advantages.group_std.mean())
    metrics["group/zero_std_share"] = float(advantages.zero_std.float().mean())
    return metrics


def select_samples(setup: Setup, rollouts: Rollouts, advantages: Tensor) -> list[MicroBatch]:
    """The micro-batches that this process learns from: all of its own, or its share of each group's best and worst.

    Args:
        advantages: ``(N, ...)`` before credit.
    """
    batches, training = rollouts.batches, setup.config.training
    if training.best_of is None:
        return batches
    scalar = advantages.flatten(1).mean(dim=1) if advantages.ndim > 1 else advantages
    ranked = best_and_worst(scalar, rollouts.groups, training.best_of)
    share = training.best_of // training.optimizer_steps_per_update
    # As for all samples: (optimizer step, prompt, sample).
    rows = [row for part in ranked.split(share, dim=1) for row in part.flatten().tolist()]
    whole = concatenated(batches, lambda local: in_order(setup, local, batches))
    chunks = [rows[start : start + len(batches[0].rows)] for start in range(0, len(rows), len(batches[0].rows))]
    own = chunks[setup.distribution.data_rank :: setup.distribution.data_processes]
    return [whole.select(chunk) for chunk in own]
