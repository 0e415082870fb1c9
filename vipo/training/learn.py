"""The optimizer steps of an update: what the policies predict, the objective of it, gradients."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.objectives import Advantages, Outcome, Points, Predictions, Share, checked_outcome, checked_points
from vipo.objectives.forward import ramped_decay
from vipo.sampling.noise import keyed_generator
from vipo.training.consistency import check_consistency
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.observed import Observed
from vipo.training.samples import MicroBatch, Sample, named
from vipo.training.setup import Setup


@dataclass(frozen=True)
class Lesson:
    """What an update learns from.

    Attributes:
        number: of the update.
        batches: this process's, the first share of them for the first optimizer step, and so on.
        advantages: of all samples, on the device.
        samples: all N of the update.
    """

    number: int
    batches: list[MicroBatch]
    advantages: Advantages
    samples: list[Sample]


@dataclass(frozen=True)
class Place:
    """Which loss of an update: a micro-batch by its place in the lesson, one of its trained transitions, an epoch."""

    batch: int
    slot: int
    epoch: int


Call = tuple[Tensor, MicroBatch, Tensor]
"""One backward pass: its loss, its micro-batch, and the transition ``(B,)`` of each sample."""


def learn(setup: Setup, lesson: Lesson) -> dict[str, float]:
    """All optimizer steps of an update.

    Returns:
        Metrics over all processes.

    Raises:
        ObjectiveError: the objective or its gate raised, or gave what cannot be used.
        TrainingError: before the first step the policy is not the one that sampled; or a gradient is not finite.
    """
    seen = Observed(setup.config.sampling.steps - 1, setup.device)
    steps = places(setup, lesson)
    old, anchor = old_predictions(setup, lesson, steps), anchor_predictions(setup, lesson, steps)
    for step, own in enumerate(steps):
        calls: list[Call] = []
        for number, place in enumerate(own):
            setup.distribution.at(lesson.number, step + 1, number + 1)
            batch = lesson.batches[place.batch]
            which = batch.steps[:, place.slot]
            with setup.distribution.gradients(setup.generator.network, number == len(own) - 1):
                outcome = outcome_of(setup, lesson, place, old.get(place), anchor.get(place))
                if step == 0:
                    seen.before_first_step(outcome, len(own), _consistent(setup, lesson, outcome, batch, which))
                else:
                    seen.after_first_step(outcome, which)
                seen.note(outcome)
                loss = outcome.loss / len(own)
                loss.backward()
            calls.append((loss.detach(), batch, which))
        total, norm = take_step(setup, lesson, calls, step)
        seen.losses.append(total)
        seen.norms.append(norm)
    return seen.metrics(setup.distribution)


def places(setup: Setup, lesson: Lesson) -> list[list[Place]]:
    """The losses of each optimizer step, in order."""
    training = setup.config.training
    per_step = len(lesson.batches) // training.optimizer_steps_per_update
    return [
        [
            Place(batch, slot, epoch)
            for batch in range(step * per_step, (step + 1) * per_step)
            for slot in range(training.trained_transitions)
        ]
        for epoch in range(training.epochs)
        for step in range(training.optimizer_steps_per_update)
    ]


def share_of(setup: Setup, lesson: Lesson, place: Place) -> Share:
    """What the objective is given of a place."""
    batch = lesson.batches[place.batch]

    def draws(purpose: str) -> list[torch.Generator]:
        key = (setup.config.seed, "objective", purpose, lesson.number)
        own = (lesson.samples[row] for row in batch.rows)
        return [keyed_generator(*key, s.prompt.id, s.index, place.slot, place.epoch) for s in own]

    return Share(batch.trajectory, batch.steps[:, place.slot], setup.chain, draws)


def _points(setup: Setup, share: Share) -> Points:
    return checked_points(setup.config.objective.name, setup.objective.points(share), share)


def old_predictions(setup: Setup, lesson: Lesson, steps: list[list[Place]]) -> dict[Place, Tensor]:
    """What the policy that sampled predicts, while it is still that one; {} where the objective does not ask."""
    if not setup.objective.needs_old:
        return {}
    with sampling_policy(setup):
        return _predictions(setup, lesson, steps)


def anchor_predictions(setup: Setup, lesson: Lesson, steps: list[list[Place]]) -> dict[Place, Tensor]:
    """What the anchor predicts; {} where the objective keeps none."""
    if "anchor" not in setup.kept:
        return {}
    with setup.kept["anchor"].instead():
        return _predictions(setup, lesson, steps)


@torch.no_grad()
def _predictions(setup: Setup, lesson: Lesson, steps: list[list[Place]]) -> dict[Place, Tensor]:
    found: dict[Place, Tensor] = {}
    for place in (place for own in steps for place in own):
        points = _points(setup, share_of(setup, lesson, place))
        conditioning = lesson.batches[place.batch].conditioning
        found[place] = setup.generator.predict(points.latents, points.times, conditioning)
    return found


def sampling_policy(setup: Setup) -> contextlib.AbstractContextManager[None]:
    """Within, the network is the policy that samples: the objective's own, or the trained one."""
    return setup.kept["sampler"].instead() if "sampler" in setup.kept else contextlib.nullcontext()


def follow(setup: Setup, number: int) -> None:
    """Let the kept policies follow the trained one, after update `number`."""
    steps = number * setup.config.training.epochs * setup.config.training.optimizer_steps_per_update
    for name, decay in setup.objective.keeps.items():
        setup.kept[name].follow(ramped_decay(steps, flat=decay.flat, rate=decay.rate, hold=decay.hold))


def outcome_of(setup: Setup, lesson: Lesson, place: Place, old: Tensor | None, anchor: Tensor | None = None) -> Outcome:
    """The objective of one place, under the policy as it is now."""
    share, objective, batch = share_of(setup, lesson, place), setup.objective, lesson.batches[place.batch]
    points = _points(setup, share)
    new = setup.generator.predict(points.latents, points.times, batch.conditioning)
    reference = reference_prediction(setup, points, batch) if objective.needs_reference else None
    advantages = _advantages(lesson, batch, share.steps)
    outcome = objective(share, points, Predictions(new, old, reference, anchor), advantages)
    return checked_outcome(setup.config.objective.name, objective.needs, outcome, share)


def _advantages(lesson: Lesson, batch: MicroBatch, steps: Tensor) -> Advantages:
    """Of a micro-batch, at one transition of each sample where they have their own."""

    def own(values: Tensor) -> Tensor:
        found = values[list(batch.rows)]
        # Positions alone are two dimensions or more: with one dimension beside the samples', it is the transitions'.
        return found[torch.arange(len(found)), steps] if found.ndim in (2, batch.trajectory.clean.ndim) else found

    whole = lesson.advantages
    return Advantages(own(whole.values), own(whole.scalar), None if whole.weights is None else own(whole.weights))


def reference_prediction(setup: Setup, points: Points, batch: MicroBatch) -> Tensor:
    """What the generator as it was predicts."""
    with torch.no_grad(), _reference_policy(setup):
        return setup.generator.predict(points.latents, points.times, batch.conditioning)


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


def _consistent(setup: Setup, lesson: Lesson, outcome: Outcome, batch: MicroBatch, steps: Tensor) -> float:
    if outcome.log_ratio is None:
        return 0.0
    return check_consistency(setup.config, outcome.log_ratio, batch, steps, lesson.samples, lesson.number)


def take_step(setup: Setup, lesson: Lesson, calls: list[Call], step: int) -> tuple[float, float]:
    """One optimizer step on the gradients that the calls left; gives the loss and the gradient's norm.

    Raises:
        TrainingError: the gradient or the loss is not finite; nothing of it is applied.
    """
    loss = float(sum((own for own, _, _ in calls), torch.zeros((), device=setup.device)))
    norm = torch.nn.utils.clip_grad_norm_(setup.trainable.values(), setup.config.optimizer.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not bool(torch.isfinite(norm)):
        raise TrainingError(
            f"update {lesson.number}, optimizer step {step + 1}: the gradient is not finite, "
            f"{_bad_calls(setup.distribution, calls, lesson.samples)}; nothing of it was applied, and the newest "
            "checkpoint is the last good state. A lower optimizer.learning_rate, or generator.precision=fp32, avoids "
            "most such cases"
        )
    if not math.isfinite(loss):
        raise TrainingError(
            f"update {lesson.number}, optimizer step {step + 1}: the loss is {loss} although its gradient is finite: "
            "what the objective or its gate gives where nothing is learned (a gate's ratio, say) is not; let it be "
            "finite. Nothing was applied, and the newest checkpoint is the last good state"
        )
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return loss, float(norm)


def _bad_calls(distribution: Distribution, calls: list[Call], samples: list[Sample]) -> str:
    """Which micro-batches of an optimizer step, of all processes, have a loss that is not finite."""
    found = [
        f"transitions {steps.tolist()} of samples {', '.join(named(samples[row]) for row in batch.rows)}"
        for loss, batch, steps in calls
        if not bool(torch.isfinite(loss))
    ]
    everyones = [text for texts in distribution.everyones(found) for text in texts]
    return "and so is the loss of " + "; ".join(everyones) if everyones else "although every loss of it is"
