"""What an update learns from: micro-batches, their advantages, and the losses that are made of them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vipo.objectives import Advantages
from vipo.training.samples import MicroBatch, Sample
from vipo.training.setup import Setup


@dataclass(frozen=True)
class Lesson:
    """What an update learns from.

    Attributes:
        number: of the update.
        batches: this process's, the first share of them for the first optimizer step, and so on.
        advantages: of all samples, on the device.
        samples: all N of the update.
        idle: those whose advantages are all 0.
    """

    number: int
    batches: list[MicroBatch]
    advantages: Advantages
    samples: list[Sample]
    idle: frozenset[int] = frozenset()

    @cached_property
    def rows(self) -> list[Tensor]:
        """Of each micro-batch, which samples it holds, ``(B,)`` on the device: the host waits for it once an update."""
        whole = torch.tensor([row for batch in self.batches for row in batch.rows])
        return list(whole.to(self.advantages.values.device).split([len(batch.rows) for batch in self.batches]))


@dataclass(frozen=True)
class Place:
    """Which loss of an update: a micro-batch by its place in the lesson, one of its trained transitions, an epoch."""

    batch: int
    slot: int
    epoch: int


def places(setup: Setup, lesson: Lesson) -> list[list[list[Place]]]:
    """The losses of each optimizer step, in order; those whose network calls are one stand together."""
    training = setup.config.training
    per_step, together = len(lesson.batches) // training.optimizer_steps_per_update, training.joined_transitions
    return [
        [
            [Place(batch, slot, epoch) for slot in range(first, first + together)]
            for batch in range(step * per_step, (step + 1) * per_step)
            for first in range(0, training.trained_transitions, together)
        ]
        for epoch in range(training.epochs)
        for step in range(training.optimizer_steps_per_update)
    ]


def with_gradient(
    setup: Setup, lesson: Lesson, planned: list[list[list[Place]]]
) -> tuple[list[list[list[Place]]], frozenset[int]]:
    """The losses of each optimizer step that the network is called for, and of which micro-batches metrics tell.

    Of an optimizer step in which something has a gradient, that are those with one. To leave the others out changes no
    bit of a gradient: they add 0 to it, and count in the mean of the losses all the same. Processes call the network
    together, so that what has a gradient in one of them is called for in all. Metrics do not depend on how many
    processes there are.
    """
    everything = frozenset(range(len(lesson.batches)))
    if not lesson.idle or not setup.objective.only_advantages or setup.config.training.base_distance:
        return planned, everything
    idle = {number for number in everything if lesson.idle.issuperset(lesson.batches[number].rows)}
    called = setup.distribution.total(
        torch.tensor([float(number not in idle) for number in sorted(everything)])
    ).tolist()
    steps, told = [], everything - idle
    for own in planned:
        kept = [joined for joined in own if called[joined[0].batch]]
        steps.append(kept or own)
        if not kept:
            told |= {joined[0].batch for joined in own}
    return steps, told
