"""The optimizer steps of an update: what the policies predict, the objective of it, gradients."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vipo.config.alarms import BASE_DISTANCE
from vipo.config.training import EMA
from vipo.objectives import Advantages, Outcome, Points, Predictions, Share, checked_outcome, checked_points
from vipo.objectives.forward import ramped_decay, velocity_kl
from vipo.sampling.noise import keyed_generator
from vipo.training.consistency import check_consistency
from vipo.training.distribution import Distribution
from vipo.training.errors import TrainingError
from vipo.training.joined import predict_joined
from vipo.training.lesson import Lesson, Place, places, with_gradient
from vipo.training.observed import Observed
from vipo.training.optimizers import learning_rate, set_learning_rate
from vipo.training.samples import MicroBatch, Sample, named
from vipo.training.setup import Setup

Call = tuple[Tensor, MicroBatch, Tensor]
"""One loss of a backward pass: its value, its micro-batch, and the transition ``(B,)`` of each sample."""


def learn(setup: Setup, lesson: Lesson) -> dict[str, float]:
    """All optimizer steps of an update.

    Returns:
        Metrics over all processes.

    Raises:
        ObjectiveError: the objective or its gate raised, or gave what cannot be used.
        TrainingError: before the first step the policy is not the one that sampled; or a gradient is not finite.
    """
    seen, config = Observed(setup.config.sampling.steps - 1, setup.device), setup.config
    rate = learning_rate(config.optimizer, lesson.number, config.training.updates)
    set_learning_rate(setup.optimizer, rate)
    planned = places(setup, lesson)
    steps, told = with_gradient(setup, lesson, planned)
    old, anchor = old_predictions(setup, lesson, steps), anchor_predictions(setup, lesson, steps)
    for step, own in enumerate(steps):
        calls: list[Call] = []
        losses = sum(map(len, planned[step]))
        for number, joined in enumerate(own):
            setup.distribution.meetings.at(lesson.number, step + 1, number + 1)
            batch = lesson.batches[joined[0].batch]
            with setup.distribution.gradients(setup.generator.network, number == len(own) - 1):
                parts = []
                for place, outcome in zip(joined, outcomes_of(setup, lesson, joined, old, anchor), strict=True):
                    which, counts = batch.steps[:, place.slot], place.batch in told
                    if step == 0:
                        largest = _consistent(setup, lesson, outcome, batch, which)
                        seen.before_first_step(outcome, largest, counts=counts)
                    else:
                        seen.after_first_step(outcome, which, counts=counts)
                    seen.note(outcome, counts=counts)
                    parts.append(outcome.loss / losses)
                    calls.append((parts[-1].detach(), batch, which))
                sum(parts[1:], parts[0]).backward()
        total, norm = take_step(setup, lesson, calls, step)
        seen.losses.append(total)
        seen.norms.append(norm)
    rates = {} if config.optimizer.is_constant else {"optimizer/learning_rate": rate}
    return seen.metrics(setup.distribution) | rates


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


def old_predictions(setup: Setup, lesson: Lesson, steps: list[list[list[Place]]]) -> dict[Place, Tensor]:
    """What the policy that sampled predicts, while it is still that one; {} where the objective does not ask."""
    if not setup.objective.needs_old:
        return {}
    with sampling_policy(setup):
        return _predictions(setup, lesson, steps)


def anchor_predictions(setup: Setup, lesson: Lesson, steps: list[list[list[Place]]]) -> dict[Place, Tensor]:
    """What the anchor predicts; {} where the objective keeps none."""
    if "anchor" not in setup.kept:
        return {}
    with setup.kept["anchor"].instead():
        return _predictions(setup, lesson, steps)


@torch.no_grad()
def _predictions(setup: Setup, lesson: Lesson, steps: list[list[list[Place]]]) -> dict[Place, Tensor]:
    found: dict[Place, Tensor] = {}
    # The very calls of the trained policy, so that its ratio to what sampled is 1 before the first step.
    for joined in (joined for own in steps for joined in own):
        points = [_points(setup, share_of(setup, lesson, place)) for place in joined]
        conditioning = lesson.batches[joined[0].batch].conditioning
        found |= zip(joined, predict_joined(setup.generator, points, conditioning), strict=True)
    return found


def sampling_policy(setup: Setup) -> contextlib.AbstractContextManager[None]:
    """Within, the network is the policy that samples: the objective's own, or the trained one."""
    return setup.kept["sampler"].instead() if "sampler" in setup.kept else contextlib.nullcontext()


def follow(setup: Setup, number: int) -> None:
    """Let the kept policies follow the trained one, after update `number`."""
    steps = number * setup.config.training.epochs * setup.config.training.optimizer_steps_per_update
    for name, decay in setup.objective.keeps.items():
        setup.kept[name].follow(ramped_decay(steps, flat=decay.flat, rate=decay.rate, hold=decay.hold))
    if (ema := setup.config.training.ema_decay) is not None:
        # As diffusers' EMAModel: at first a plain mean, so that the start is not what a short run averages.
        setup.kept[EMA].follow(min(ema, (1 + number) / (10 + number)))


def outcomes_of(
    setup: Setup,
    lesson: Lesson,
    joined: Sequence[Place],
    old: Mapping[Place, Tensor],
    anchor: Mapping[Place, Tensor],
) -> list[Outcome]:
    """The objective of each place of one micro-batch, under the policy as it is now, which is called once."""
    objective, batch = setup.objective, lesson.batches[joined[0].batch]
    shares = [share_of(setup, lesson, place) for place in joined]
    points = [_points(setup, share) for share in shares]
    news = predict_joined(setup.generator, points, batch.conditioning)
    references: Sequence[Tensor | None] = [None] * len(joined)
    measured = setup.config.training.base_distance
    if objective.needs_reference or measured:
        references = reference_predictions(setup, points, batch)
    found = []
    for place, share, own, new, reference in zip(joined, shares, points, news, references, strict=True):
        given = reference if objective.needs_reference else None
        predictions = Predictions(new, old.get(place), given, anchor.get(place))
        outcome = objective(share, own, predictions, _advantages(lesson, place, share.steps))
        outcome = checked_outcome(setup.config.objective.name, objective.needs, outcome, share)
        if measured and reference is not None:
            apart = {BASE_DISTANCE: velocity_kl(new.detach(), reference).mean()}
            outcome = replace(outcome, metrics={**outcome.metrics, **apart})
        found.append(outcome)
    return found


def _advantages(lesson: Lesson, place: Place, steps: Tensor) -> Advantages:
    """Of a micro-batch, at one transition of each sample where they have their own."""
    rows, positions = lesson.rows[place.batch], lesson.batches[place.batch].trajectory.clean.ndim

    def own(values: Tensor) -> Tensor:
        # Positions alone are two dimensions or more: with one dimension beside the samples', it is the transitions'.
        return values[rows, steps] if values.ndim in (2, positions) else values[rows]

    whole = lesson.advantages
    return Advantages(own(whole.values), own(whole.scalar), None if whole.weights is None else own(whole.weights))


def reference_predictions(setup: Setup, points: Sequence[Points], batch: MicroBatch) -> list[Tensor]:
    """What the generator as it was predicts at each of the points."""
    with torch.no_grad(), _reference_policy(setup):
        return predict_joined(setup.generator, points, batch.conditioning)


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
    gradients = [value.grad for value in setup.trainable.values() if value.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # As `clip_grads_with_norm_` has it; the host waits once for all three.
    factor = setup.config.optimizer.max_grad_norm / (whole + 1e-6)
    total = sum((own for own, _, _ in calls), torch.zeros((), device=setup.device))
    loss, size, factor = torch.stack([total, whole.to(total), factor.to(total)]).tolist()
    if not math.isfinite(size):
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
    # It would multiply every gradient by 1 where nothing is to be cut.
    if factor < 1:
        torch.nn.utils.clip_grads_with_norm_(setup.trainable.values(), setup.config.optimizer.max_grad_norm, norm)
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return loss, size


def _bad_calls(distribution: Distribution, calls: list[Call], samples: list[Sample]) -> str:
    """Which micro-batches of an optimizer step, of all processes, have a loss that is not finite."""
    found = [
        f"transitions {steps.tolist()} of samples {', '.join(named(samples[row]) for row in batch.rows)}"
        for loss, batch, steps in calls
        if not bool(torch.isfinite(loss))
    ]
    everyones = [text for texts in distribution.everyones(found) for text in texts]
    return "and so is the loss of " + "; ".join(everyones) if everyones else "although every loss of it is"
