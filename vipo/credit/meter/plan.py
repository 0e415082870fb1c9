"""How much is measured, the reference gradient, and what a record is."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vipo.credit.meter.directions import Size
from vipo.credit.meter.space import products

Record = dict[str, Any]
"""What was found of one update, as its file has it."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        update_groups: groups of one update, as in training.
        updates: how many updates' directions are measured.
        reference_batches: of the pathwise reference, each of as many samples as a group has, of different prompts; 0:
            the directional estimator alone.
        blocks: into how many parts the reference is kept, which are left out one at a time for its interval.
        stepped: of how many updates steps are taken (the directional estimator); 0: none.
        held_out, held_out_samples: prompts, and samples of each, whose reward is compared before and after a step.
        size: what is the same for all steps.
        change: how much of it; None: what the optimizer's own first step changes under the first source.
        probes: held-out samples on whose states `size` is measured.
    """

    update_groups: int
    updates: int
    reference_batches: int
    blocks: int
    stepped: int
    held_out: int
    held_out_samples: int
    size: Size
    change: float | None
    probes: int = 16


@dataclass(frozen=True)
class Reference:
    """The gradient of the expected reward, in independent parts.

    Attributes:
        means: ``(B, size)`` float32, the mean gradient of each part.
        batches: how many batches are in each.
    """

    means: Tensor
    batches: list[int]

    @property
    def gram(self) -> Tensor:
        """``(B, B)`` float64, their inner products."""
        return products(self.means, self.means)
