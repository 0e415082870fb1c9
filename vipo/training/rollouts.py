"""What an update sampled."""

from dataclasses import dataclass
from typing import Any

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


def in_order(setup: Setup, local: Tensor, batches: list[MicroBatch]) -> Tensor:
    """Values ``(n, ...)`` of this process's samples, gathered to ``(N, ...)`` in the order of all samples."""
    return setup.distribution.in_order(local, [row for batch in batches for row in batch.rows])
