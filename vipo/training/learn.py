"""The optimizer steps of an update: log-ratios of the trained transitions, the objective, gradients."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.objectives import clipped_surrogate, normalized_log_ratio
from vipo.sampling.rollout import TransitionBatch, policy_transition
from vipo.sampling.transitions import position_kl, position_log_prob
from vipo.training.consistency import check_consistency
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.observed import Observed
from vipo.training.samples import MicroBatch, Sample, named
from vipo.training.setup import Setup

Call = tuple[Tensor, MicroBatch, Tensor]
"""One backward pass: its loss, its micro-batch, and the transition ``(B,)`` of each sample."""


def learn(
    setup: Setup, batches: list[MicroBatch], advantages: Tensor, samples: list[Sample], number: int
) -> dict[str, float]:
    """All optimizer steps of an update.

    Args:
        setup: the run.
        batches: this process's, the first share of them for the first optimizer step, and so on.
        advantages: ``(N,)``, or ``(N, [T,] H, W)`` with credit, of all samples.
        samples: all of the update.
        number: of the update.

    Returns:
        Metrics over all processes.

    Raises:
        TrainingError: before the first step the policy is not the one that sampled; or a gradient is not finite.
    """
    training, device = setup.config.training, setup.device
    slots = training.trained_transitions
    per_step = len(batches) // training.optimizer_steps_per_update
    seen = Observed(setup.config.sampling.steps - 1, device)
    for step in range(training.epochs * training.optimizer_steps_per_update):
        first = (step % training.optimizer_steps_per_update) * per_step
        places = [(batch, slot) for batch in batches[first : first + per_step] for slot in range(slots)]
        calls: list[Call] = []
        for place, (batch, slot) in enumerate(places):
            setup.distribution.at(number, step + 1, place + 1)
            with setup.distribution.gradients(setup.generator.network, place == len(places) - 1):
                which = batch.steps[:, slot]
                moved = policy_transition(setup.generator, batch.conditioning, batch.trajectory, which, setup.chain)
                log_ratio = log_ratio_of(setup, moved)
                if step == 0:
                    seen.before_first_step(log_ratio.detach(), len(places))
                    seen.largest = max(
                        seen.largest, check_consistency(setup.config, log_ratio.detach(), batch, which, samples, number)
                    )
                surrogate = objective_of(setup, moved, log_ratio, which, advantages[list(batch.rows)])
                if step > 0:
                    seen.after_first_step(surrogate.log_ratio, surrogate.clipped, which)
                loss = surrogate.loss
                if setup.config.objective.kl_weight > 0:
                    kl = kl_to_reference(setup, moved, batch, which)
                    seen.divergences.append(kl.detach())
                    loss = loss + setup.config.objective.kl_weight * kl
                loss = loss / len(places)
                loss.backward()
            calls.append((loss.detach(), batch, which))
        seen.losses.append(float(sum((loss for loss, _, _ in calls), torch.zeros((), device=device))))
        seen.norms.append(take_step(setup, calls, samples, number, step))
    return seen.metrics(setup.distribution)


@dataclass(frozen=True)
class Gated:
    """The objective of one call.

    Attributes:
        loss: scalar with its gradient.
        clipped: ``(B,)``, the share of each sample that the gate dropped.
        log_ratio: ``(B, [T,] H, W)`` as the gate saw it, without gradient.
    """

    loss: Tensor
    clipped: Tensor
    log_ratio: Tensor


def log_ratio_of(setup: Setup, moved: TransitionBatch) -> Tensor:
    """``logp_new(p) - logp_old(p)`` of a transition, ``(B, [T,] H, W)`` with its gradient."""
    objective = setup.config.objective
    new, old = (
        position_log_prob(moved.value, mean, moved.std, objective.channels, objective.density)
        for mean in (moved.mean, moved.old_mean)
    )
    return new - old


def objective_of(setup: Setup, moved: TransitionBatch, log_ratio: Tensor, steps: Tensor, advantages: Tensor) -> Gated:
    """The clipped surrogate of one micro-batch and transition, its ratio normalised where GRPO-Guard asks for it."""
    objective, weights = setup.config.objective, None
    if objective.ratio_norm == "guard":
        kl = position_kl(moved.mean, moved.old_mean, moved.std, objective.channels)
        # GRPO-Guard's second half: a step's gradient is proportional to dt, this makes the steps count alike.
        weights = 1 / (setup.chain.levels[steps] - setup.chain.levels[steps + 1])
        log_ratio = normalized_log_ratio(log_ratio, kl, moved.std.flatten())
    surrogate = clipped_surrogate(
        log_ratio,
        advantages,
        ratio=objective.ratio,
        side=objective.clip.side,
        scope=objective.clip.scope,
        clip_range=objective.clip.range,
        weights=weights,
    )
    return Gated(surrogate.loss, surrogate.clipped, log_ratio.detach())


def kl_to_reference(setup: Setup, moved: TransitionBatch, batch: MicroBatch, steps: Tensor) -> Tensor:
    """KL divergence of a transition to the generator as it was, mean over samples and positions."""
    with torch.no_grad(), _reference_policy(setup):
        prediction = setup.generator.predict(moved.latents, setup.chain.times[steps], batch.conditioning)
        mean, _ = setup.chain.gaussian(moved.latents, prediction, steps)
    return position_kl(moved.mean, mean, moved.std, setup.config.objective.channels).mean()


@contextlib.contextmanager
def _reference_policy(setup: Setup) -> Iterator[None]:
    policy = setup.generator.network
    # The network itself: a second call of its distributed wrapper before the backward pass would disturb that.
    network: Any = setup.distribution.unwrap(policy) if setup.reference is None else setup.reference
    setup.generator.network = network
    if setup.reference is None:
        network.disable_adapters()
    try:
        yield
    finally:
        if setup.reference is None:
            network.enable_adapters()
        setup.generator.network = policy


def take_step(setup: Setup, calls: list[Call], samples: list[Sample], number: int, step: int) -> float:
    """One optimizer step on the gradients that the calls left; gives their norm.

    Raises:
        TrainingError: the gradient is not finite; nothing of it is applied.
    """
    norm = torch.nn.utils.clip_grad_norm_(setup.trainable.values(), setup.config.optimizer.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not bool(torch.isfinite(norm)):
        raise TrainingError(
            f"update {number}, optimizer step {step + 1}: the gradient is not finite, "
            f"{_bad_calls(setup.distribution, calls, samples)}; nothing of it was applied, and the newest checkpoint "
            "is the last good state. A lower optimizer.learning_rate, or generator.precision=fp32, avoids most such "
            "cases"
        )
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return float(norm)


def _bad_calls(distribution: Distribution, calls: list[Call], samples: list[Sample]) -> str:
    """Which micro-batches of an optimizer step, of all processes, have a loss that is not finite."""
    found = [
        f"transitions {steps.tolist()} of samples {', '.join(named(samples[row]) for row in batch.rows)}"
        for loss, batch, steps in calls
        if not bool(torch.isfinite(loss))
    ]
    everyones = [text for texts in distribution.everyones(found) for text in texts]
    return "and so is the loss of " + "; ".join(everyones) if everyones else "although every loss of it is"
