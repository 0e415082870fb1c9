"""What an update sampled."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vipo.training.samples import MicroBatch, Sample
from vipo.training.setup import Setup


@dataclass(frozen=True)
class Rollouts:
    """What an update sampled.

    Attributes:
        number: of the update.
        samples: all N of the update, in their order.
        groups: ``(N,)`` int64, the group of each sample.
        batches: this process's micro-batches, n samples in all; each knows the rows of its samples.
        pictures: ``(n, *sample_shape)`` float32 in [0, 1], decoded from them in their order.
        seen: by credit source, what it saw while each micro-batch was drawn.
        stochastic: the steps that drew noise.
    """

    number: int
    samples: list[Sample]
    groups: Tensor
    batches: list[MicroBatch]
    pictures: Tensor
    seen: dict[str, list[Any]]
    stochastic: range

    @property
    def rows(self) -> list[int]:
        """Of this process's samples."""
        return [row for batch in self.batches for row in batch.rows]


def decoded(setup: Setup, clean: Tensor) -> Tensor:
    """Pictures ``(b, *sample_shape)`` of clean latents, as many at a time as `training.decode_batch` says."""
    size = setup.config.training.decode_batch or setup.config.training.micro_batch
    parts = [setup.generator.pictures(latents) for latents in clean.split(size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_order(setup: Setup, local: Tensor, batches: list[MicroBatch]) -> Tensor:
    """Values ``(n, ...)`` of this process's samples, gathered to ``(N, ...)`` in the order of all samples."""
    return setup.distribution.in_order(local, [row for batch in batches for row in batch.rows])
