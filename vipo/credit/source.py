"""What a credit source is given, and what it gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipo.config.perception import PerceptionConfig
from vipo.credit.costs import Costs
from vipo.errors import VipoError
from vipo.generators import Generator
from vipo.parts import Part
from vipo.prompts import Prompt
from vipo.rewards import Reward
from vipo.sampling.noise import keyed_generator
from vipo.sampling.rollout import Trajectory


class CreditError(VipoError):
    """A credit source that cannot be loaded, used or trusted; the message names it."""


@dataclass(frozen=True)
class Context:
    """What a run has loaded, for a source to load and check what it needs before the first computation.

    Attributes:
        generator: whose samples are weighted.
        prompts: of the training split.
        rewards: by the label of their term.
        perception: section `perception`.
        root: repository root, for relative paths.
        is_main: whether this process is the one that logs.
    """

    generator: Generator
    prompts: Sequence[Prompt]
    rewards: Mapping[str, Reward]
    perception: PerceptionConfig
    root: Path
    is_main: bool = True


@dataclass(frozen=True)
class Samples:
    """An update's samples as this process has them: n of all N, row by row the same sample in every field.

    Attributes:
        pictures: ``(n, 3, height, width)`` float32 in [0, 1], of videos ``(n, frames, 3, height, width)``.
        clean: ``(n, C, [T,] H, W)`` float32, the latents that they were decoded from.
        groups: ``(n,)`` int64, on the device of `clean`: samples of one prompt that are compared with each other.
        prompts: n, with their metadata.
        numbers: n, of each sample in its group.
        frame_groups: of videos, the frames that each of the T latent frames covers.
        trajectories: the chains that led to `clean`, one for each piece of `batch` samples, in order.
        seen: of each piece, what the source's own `after_rollout` gave.
        batch: samples that fit into a network at once; None: all of them.
        seed, update: what keys every draw.
        gather: from values ``(n, ...)`` of this process's samples to ``(N, ...)`` of all processes', in one order. A
            source that calls it does so equally often in every process.
    """

    pictures: Tensor
    clean: Tensor
    groups: Tensor
    prompts: Sequence[Prompt]
    numbers: Sequence[int]
    frame_groups: Sequence[range] | None = None
    trajectories: Sequence[Trajectory] = ()
    seen: Sequence[Any] = ()
    batch: int | None = None
    seed: int = 0
    update: int = 1
    gather: Callable[[Tensor], Tensor] = field(default=lambda values: values)

    def __len__(self) -> int:
        """n."""
        return len(self.clean)

    @property
    def positions(self) -> tuple[int, ...]:
        """``([T,] H, W)`` of the latents: what weights are given for."""
        return tuple(self.clean.shape[2:])

    @property
    def grid(self) -> tuple[int, int]:
        """H and W."""
        return self.clean.shape[-2], self.clean.shape[-1]

    def pieces(self) -> list[Tensor]:
        """`pictures` in pieces of `batch`."""
        return list(self.pictures.split(self.batch or len(self)))

    def draws(self, purpose: str) -> list[torch.Generator]:
        """A CPU generator for each sample: the same on any number of processes, before and after a resume."""
        return [
            keyed_generator(self.seed, purpose, self.update, prompt.id, number)
            for prompt, number in zip(self.prompts, self.numbers, strict=True)
        ]


@dataclass(frozen=True)
class Weights:
    """What a source gives.

    Attributes:
        values: ``(n, [T,] H, W)``, or ``(n, S, [T,] H, W)`` where each of the S transitions of the chain but its last
            step has its own; finite, at least 0.
        constant: ``(n,)`` bool, samples of which the source has nothing to say: ones, which controls leave as they are.
        converged: ``(n,)`` bool, False where the weights are approximate.
        mean_one: whether they were divided by their mean over a sample's positions, so that what is made of them is.
        costs: of each sample; shown, and no part of the result.
    """

    values: Tensor
    constant: Tensor | None = None
    converged: Tensor | None = None
    mean_one: bool = False
    costs: Costs = field(default_factory=Costs)


class CreditSource(Part, ABC):
    """Says how much of a sample's advantage each position gets."""

    def set_up(self, context: Context) -> None:
        """Load and check what the source needs, before the first computation.

        Raises:
            CreditError: it cannot work with this run.
        """

    @property
    def inputs(self) -> Mapping[str, Path]:
        """Files or folders of weights that `set_up` read, by what they are: a part of the run's identity."""
        return {}

    def before_rollout(self, generator: Generator, prompts: Sequence[Prompt]) -> None:
        """Called before a piece of samples of `prompts` is drawn: the place for hooks in the generator's network."""

    def after_rollout(self, generator: Generator) -> Any:
        """Called when the piece is drawn, before it is decoded; what it gives stands in `Samples.seen`."""

    @abstractmethod
    def __call__(self, samples: Samples) -> Tensor | Weights:
        """Weights of the samples; bare values of a tensor where nothing else is to be said."""
