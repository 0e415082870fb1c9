"""Draws of the forward process: at which levels a clean sample is noised, and with what."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vipo.sampling.noise import Key, keyed_generator

LevelChoice = Literal["drawn", "stratified"]

# Of the levels of a chain, the share that the stratified choice of AWM's code draws from.
_SHARE = 0.9


def forward_steps(choice: LevelChoice, keys: Sequence[Key], count: int, steps: int) -> Tensor:
    """At which of the chain's T levels each sample is noised.

    Args:
        choice: 'drawn': different ones, in a random order (DiffusionNFT's code). 'stratified': one of each of `count`
            equal pieces of the first nine tenths without the very first, pure noise (AWM's code, `discrete_wo_init`;
            it shares its draw among the few samples of a network call, here each sample has its own); where there are
            more pieces than levels, some come twice.
        keys: one per sample.
        count: K, levels of a sample; at most `steps`.
        steps: T, of the chain.

    Returns:
        ``(len(keys), K)`` int64 in [0, T), an index into the chain's levels.

    Raises:
        ValueError: more levels are asked for than there are.
    """
    if count > steps:
        raise ValueError(f"count: {count} levels of a chain of {steps}")
    if choice == "drawn":
        return torch.stack([torch.randperm(steps, generator=keyed_generator(*key))[:count] for key in keys])
    bounds = torch.linspace(1, max(1, int(_SHARE * steps)), count + 1, dtype=torch.float64).long()
    drawn = torch.stack([torch.rand(count, generator=keyed_generator(*key), dtype=torch.float64) for key in keys])
    return (bounds[:-1] + (drawn * (bounds[1:] - bounds[:-1])).long()).clamp_max(steps - 1)
