"""One update, as the algorithm reads: roll out -> score -> credit -> advantages -> learn.

An update samples ``prompts_per_update x group_size`` trajectories with the current policy, decodes and scores them,
says where in each of them its advantage goes, and takes ``optimizer_steps_per_update`` steps on the objective. Samples
are in the order ``(optimizer step, prompt, sample)``, so that every step holds the same share of every group, and the
micro-batches of the rollout are those of learning: the same network calls, hence ratios of exactly one, unless
``rollout_batch`` joins several.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vipo import credit
from vipo.credit import Credit, Samples
from vipo.generators.embeddings import stack_conditioning
from vipo.objectives import (
    Advantages,
    GroupAdvantages,
    allocate_advantages,
    best_and_worst,
    group_advantages,
    step_advantages,
)
from vipo.rewards import RewardError, begin
from vipo.sampling.chain import stochastic_steps
from vipo.sampling.noise import Key
from vipo.sampling.rollout import rollout
from vipo.training.alarms import alarm_metrics, picture_signs, thumbnails
from vipo.training.errors import TrainingError
from vipo.training.learn import follow, learn, sampling_policy
from vipo.training.lesson import Lesson
from vipo.training.rollouts import Rollouts, decoded, in_order
from vipo.training.samples import (
    MicroBatch,
    Sample,
    arrange_samples,
    chosen_transitions,
    concatenated,
    update_prompts,
)
from vipo.training.scores import Scores, score_samples, score_transitions
from vipo.training.setup import Setup
from vipo.training.shared_starts import begun, shared_starts

log = logging.getLogger(__name__)


Show = Callable[[Rollouts, Tensor | None], None]
"""Shows an update's samples to people: this process's pictures, and the weights of all samples."""


def update(
    setup: Setup,
    number: int,
    stop_if_asked: Callable[[int], None] = lambda finished: None,
    show: Show | None = None,
) -> dict[str, float]:
    """One update of the policy.

    Args:
        setup: the run.
        number: which update, from 1; with the seed it keys every draw.
        stop_if_asked: called between micro-batches with the number of the last finished update; may raise.
        show: called before the pictures are let go of; changes nothing.

    Returns:
        The update's metrics: deterministic values only.

    Raises:
        RewardError: a reward raised, or no sample has a finite one.
        CreditError, ObjectiveError: a part that the configuration names raised, or gave what cannot be used.
        TrainingError: the policy is not the one that sampled, or a gradient is not finite.
    """
    setup.distribution.meetings.at(number)
    with sampling_policy(setup):
        rollouts = roll_out(setup, number, stop_if_asked)
    with setup.timer("reward"):
        scores = score_transitions(setup, rollouts, score_samples(setup, rollouts))
    with setup.timer("map"):
        found = assign_credit(setup, rollouts)
    if show is not None:
        with setup.timer("sheet"):
            show(rollouts, found.weights)
    advantages = form_advantages(setup, rollouts, scores, found)
    metrics = reward_metrics(setup, scores, advantages) | sign_metrics(setup, rollouts) | dict(found.metrics)
    metrics |= {f"credit/{name}": float(count) for name, count in (found.costs + scores.costs).counted.items()}
    lesson = choose_lesson(setup, rollouts, found, advantages)
    # The pictures of an update are many, and so is what best_of leaves out; learning is where memory peaks.
    del rollouts, found
    with setup.timer("learn"):
        metrics |= learn(setup, lesson)
        follow(setup, number)
    return metrics


def roll_out(setup: Setup, number: int, stop_if_asked: Callable[[int], None] = lambda finished: None) -> Rollouts:
    """Sample this process's share of the update, and decode it."""
    config, size = setup.config, setup.config.training.micro_batch
    prompts = update_prompts(setup.prompts, config.seed, number, config.training.prompts_per_update)
    samples = arrange_samples(prompts, config.training.group_size, config.training.optimizer_steps_per_update)
    stochastic = (
        stochastic_steps(config.sampling.window, len(setup.chain.trainable), config.seed, number)
        if config.sampling.ode is None
        else range(0)
    )
    trained = setup.chain.trainable if setup.objective.needs == "none" else stochastic
    transitions = chosen_transitions(samples, config.training, trained, config.seed, number).to(setup.device)
    starts = range(0, len(samples), size)[setup.distribution.data_rank :: setup.distribution.data_processes]
    together = (config.training.rollout_batch or size) // size
    shared = shared_starts(setup, number, prompts, stochastic.start)
    batches: list[MicroBatch] = []
    seen: dict[str, list[Any]] = {name: [] for name in setup.sources}
    pictures = torch.empty(0)
    for first in range(0, len(starts), together):
        stop_if_asked(number - 1)
        rows = [row for start in starts[first : first + together] for row in range(start, start + size)]
        chunk = [samples[row] for row in rows]
        conditioning = stack_conditioning(setup.embeddings, [sample.prompt.id for sample in chunk])
        initial: list[Key] = [
            (config.seed, "initial", number, s.prompt.id, -1 if config.sampling.same_initial_noise else s.index)
            for s in chunk
        ]
        steps: list[Key] = [(config.seed, "step", number, s.prompt.id, s.index) for s in chunk]
        for source in setup.sources.values():
            source.before_rollout(setup.generator, [sample.prompt for sample in chunk])
        with setup.timer("rollout"):
            begins, solver = begun(shared, [sample.prompt for sample in chunk]), config.sampling.solver
            trajectory = rollout(setup.generator, conditioning, setup.chain, stochastic, initial, steps, solver, begins)
        for name, source in setup.sources.items():
            seen[name].append(source.after_rollout(setup.generator))
            if seen[name][-1] is not None and (together > 1 or shared):
                fix = "training.rollout_batch=null" if together > 1 else "sampling.window.shared_start=false"
                raise TrainingError(f"credit source {name!r} watches the rollout of each micro-batch; set {fix}")
        batches += MicroBatch(tuple(rows), conditioning, trajectory, transitions[rows]).split(size)
        with setup.timer("decode"):
            shown = decoded(setup, trajectory.clean)
        _begin_rewards(setup, shown, chunk)
        if not first:
            # One tensor from the start: to join them afterwards would need them twice.
            pictures = shown.new_empty(len(starts) * size, *shown.shape[1:])
        pictures[first * size : first * size + len(chunk)] = shown
        # Else they would be there twice while the next ones are drawn.
        del shown
    groups = torch.tensor([sample.group for sample in samples])
    return Rollouts(number, samples, groups, batches, pictures, seen, stochastic)


def _begin_rewards(setup: Setup, pictures: Tensor, chunk: Sequence[Sample]) -> None:
    """Let rewards elsewhere start on samples while others are drawn, in the batches that they will be asked for."""
    size = setup.config.training.reward_batch or setup.config.training.micro_batch
    if len(chunk) % size:
        return
    for start in range(0, len(chunk), size):
        part = chunk[start : start + size]
        for reward in setup.rewards.values():
            begin(
                reward, pictures[start : start + size], [s.prompt.text for s in part], [s.prompt.metadata for s in part]
            )


def assign_credit(setup: Setup, rollouts: Rollouts) -> Credit:
    """Where in each sample its advantage goes, and what the metrics say of it."""
    if not setup.sources:
        return Credit(None, {})
    own = [rollouts.samples[row] for row in rollouts.rows]
    samples = Samples(
        pictures=rollouts.pictures,
        clean=torch.cat([batch.trajectory.clean for batch in rollouts.batches]),
        groups=rollouts.groups[rollouts.rows].to(setup.device),
        prompts=[sample.prompt for sample in own],
        numbers=[sample.index for sample in own],
        frame_groups=setup.generator.frame_groups,
        trajectories=[batch.trajectory for batch in rollouts.batches],
        batch=setup.config.training.micro_batch,
        seed=setup.config.seed,
        update=rollouts.number,
        gather=lambda local: in_order(setup, local, rollouts.batches),
    )
    config = setup.config.credit
    return credit.assign_credit(setup.sources, samples, config.control, rollouts.seen, config.mixture)


def form_advantages(setup: Setup, rollouts: Rollouts, scores: Scores, found: Credit) -> GroupAdvantages:
    """Rewards to advantages by the statistics of each group; samples without a finite reward are left out and told.

    Raises:
        RewardError: no sample has a finite reward.
    """
    config, multiplied = setup.config.advantages, setup.config.credit.multiplies
    weights = {term.label: term.weight for term in setup.config.reward.terms}
    options = (rollouts.groups, config.std_floor, config.clip, config.std)
    if scores.steps:
        result = step_advantages(scores.steps, weights, *options, combine=config.combine)
    else:
        credit_of = found.weights.cpu() if found.weights is not None and multiplied == "reward" else None
        result = group_advantages(scores.rewards, weights, *options, credit_of, config.combine)
    if not bool(result.valid.any()):
        raise RewardError(
            f"update {rollouts.number}: no sample has a finite reward; check the rewards {', '.join(scores.rewards)}"
        )
    for row in torch.nonzero(~result.valid).flatten().tolist():
        log.warning(
            "update %d: sample %d of %r left out, its reward is not finite",
            rollouts.number,
            rollouts.samples[row].index,
            rollouts.samples[row].prompt.text,
        )
    return result


def reward_metrics(setup: Setup, scores: Scores, advantages: GroupAdvantages) -> dict[str, float]:
    """What is logged of an update's rewards and of its groups."""
    weights, valid = {term.label: term.weight for term in setup.config.reward.terms}, advantages.valid
    total = torch.stack([weights[name] * values.double() for name, values in scores.rewards.items()]).sum(dim=0)[valid]
    metrics = {
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std(correction=0)),
        "samples/invalid": float((~valid).sum()),
    }
    metrics |= {f"reward/{name}/mean": float(values.double()[valid].mean()) for name, values in scores.rewards.items()}
    metrics["group/std"] = float(advantages.group_std.mean())
    metrics["group/zero_std_share"] = float(advantages.zero_std.float().mean())
    return metrics


def sign_metrics(setup: Setup, rollouts: Rollouts) -> dict[str, float]:
    """Signs of reward hacking in the pictures of all processes."""
    pieces = rollouts.pictures.split(setup.config.training.micro_batch)
    signs, thumbs = (torch.cat([of(piece) for piece in pieces]) for of in (picture_signs, thumbnails))
    whole = in_order(setup, torch.cat([signs, thumbs], dim=1).to(setup.device), rollouts.batches).cpu()
    return alarm_metrics(whole[:, : signs.shape[1]], whole[:, signs.shape[1] :], rollouts.groups)


def choose_lesson(setup: Setup, rollouts: Rollouts, found: Credit, advantages: GroupAdvantages) -> Lesson:
    """What is learned from: this process's samples, or its share of each group's best and worst."""
    values = advantages.values
    scalar = values.flatten(1).mean(dim=1) if values.ndim > 1 else values
    idle = frozenset(np.flatnonzero(~values.numpy().reshape(len(values), -1).any(axis=1)).tolist())
    batches = _chosen_batches(setup, rollouts, scalar)
    values, scalar = values.to(setup.device), scalar.to(setup.device)
    own = Advantages(values, scalar)
    if found.weights is not None and setup.config.credit.multiplies == "advantage":
        weights = found.weights
        if values.ndim == 2 and weights.ndim < batches[0].trajectory.clean.ndim:
            # One map a sample, and an advantage a transition.
            weights = weights.unsqueeze(1).expand(-1, values.shape[1], *weights.shape[1:])
        own = Advantages(allocate_advantages(values, weights), scalar, weights)
    return Lesson(rollouts.number, batches, own, rollouts.samples, idle)


def _chosen_batches(setup: Setup, rollouts: Rollouts, scalar: Tensor) -> list[MicroBatch]:
    batches, training = rollouts.batches, setup.config.training
    if training.best_of is None:
        return batches
    ranked = best_and_worst(scalar, rollouts.groups, training.best_of)
    share = training.best_of // training.optimizer_steps_per_update
    # As for all samples: (optimizer step, prompt, sample).
    rows = [row for part in ranked.split(share, dim=1) for row in part.flatten().tolist()]
    whole = concatenated(batches, lambda local: in_order(setup, local, batches))
    chunks = [rows[start : start + len(batches[0].rows)] for start in range(0, len(rows), len(batches[0].rows))]
    own = chunks[setup.distribution.data_rank :: setup.distribution.data_processes]
    return [whole.select(chunk) for chunk in own]
