"""Which samples an update draws, in which order, and which of their transitions are trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.config.training import TrainingConfig
from vipo.prompts import Prompt
from vipo.sampling.noise import Key, keyed_generator
from vipo.sampling.rollout import Trajectory
from vipo.training.errors import TrainingError


@dataclass(frozen=True)
class Sample:
    """One sample of an update."""

    prompt: Prompt
    group: int
    index: int


def named(sample: Sample) -> str:
    """A sample as messages tell it."""
    return f"{sample.index} of {sample.prompt.text!r}"


@dataclass(frozen=True)
class MicroBatch:
    """Samples that share every network call of the update, and of the rollout unless that joins several."""

    rows: tuple[int, ...]
    conditioning: dict[str, Tensor]
    trajectory: Trajectory
    steps: Tensor

    def select(self, rows: Sequence[int]) -> "MicroBatch":
        """The samples `rows`, in that order, every tensor aligned."""
        place = {row: index for index, row in enumerate(self.rows)}
        index = torch.tensor([place[row] for row in rows], device=self.steps.device)
        conditioning = {name: value[index] for name, value in self.conditioning.items()}
        return MicroBatch(tuple(rows), conditioning, self.trajectory.select(index), self.steps[index])

    def split(self, size: int) -> list["MicroBatch"]:
        """Pieces of `size` samples, in order; where it is no larger, itself and no copy."""
        if len(self.rows) <= size:
            return [self]
        return [self.select(self.rows[start : start + size]) for start in range(0, len(self.rows), size)]


def update_prompts(prompts: Sequence[Prompt], seed: int, update: int, count: int) -> list[Prompt]:
    """The prompts of update `update` (from 1): consecutive pieces of a fresh keyed permutation per pass.

    Raises:
        TrainingError: fewer prompts than one update takes.
    """
    per_pass = len(prompts) // count
    if per_pass == 0:
        raise TrainingError(
            f"training.prompts_per_update {count} exceeds the {len(prompts)} training prompts; lower it or add prompts"
        )
    number, piece = divmod(update - 1, per_pass)
    order = torch.randperm(len(prompts), generator=keyed_generator(seed, "prompts", number)).tolist()
    return [prompts[i] for i in order[piece * count : (piece + 1) * count]]


def arrange_samples(prompts: Sequence[Prompt], group_size: int, optimizer_steps: int) -> list[Sample]:
    """All samples of an update in the order ``(optimizer step, prompt, sample)``."""
    share = group_size // optimizer_steps
    return [
        Sample(prompt, group, step * share + i)
        for step in range(optimizer_steps)
        for group, prompt in enumerate(prompts)
        for i in range(share)
    ]


def chosen_transitions(
    samples: Sequence[Sample], training: TrainingConfig, stochastic: range, seed: int, update: int
) -> Tensor:
    """Which transitions are trained: ``(N, K)`` int64 of `stochastic` steps, increasing along K.

    Source of 'stratified': the public code of AWM (arXiv 2509.25050), which leaves out a tenth of the chain as well.
    """
    count, choice = training.trained_transitions, training.transition_choice
    if choice == "first":
        return torch.tensor(stochastic[:count]).expand(len(samples), count)
    keys: list[Key] = [
        (seed, "transitions", update) if choice == "shared" else (seed, "transitions", update, s.prompt.id, s.index)
        for s in samples
    ]
    if choice == "stratified":
        bounds = torch.linspace(0, len(stochastic), count + 1, dtype=torch.float64).long()
        places = torch.stack([torch.rand(count, generator=keyed_generator(*key), dtype=torch.float64) for key in keys])
        return bounds[:-1] + (places * bounds.diff()).long() + stochastic.start
    drawn = [torch.randperm(len(stochastic), generator=keyed_generator(*key))[:count].sort().values for key in keys]
    return torch.stack(drawn) + stochastic.start


def concatenated(batches: Sequence[MicroBatch], gather: Callable[[Tensor], Tensor]) -> MicroBatch:
    """All samples of an update in their order, as one batch whose row i is sample i.

    Args:
        batches: this process's.
        gather: from values ``(n, ...)`` of this process's samples to those of all, ``(N, ...)``, in order.
    """
    conditioning = {
        name: gather(torch.cat([batch.conditioning[name] for batch in batches])) for name in batches[0].conditioning
    }
    trajectory = Trajectory(
        *(
            gather(torch.cat([getattr(batch.trajectory, name) for batch in batches]))
            for name in ("latents", "means", "clean")
        )
    )
    steps = gather(torch.cat([batch.steps for batch in batches]))
    return MicroBatch(tuple(range(len(steps))), conditioning, trajectory, steps)
