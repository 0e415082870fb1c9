"""Keyed random draws: the determinism contract in one place.

Every draw comes from a CPU generator whose seed is a hash of a key such as
``(seed, "initial", update, prompt_id, sample)``. A sample's noise is therefore the same on any
number of processes and in any batch, before and after a resume. No global generator is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vipo.keys import Key, keyed_seed

__all__ = ["Key", "keyed_generator", "keyed_normal", "keyed_seed"]


def keyed_generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for `key`."""
    return torch.Generator(device="cpu").manual_seed(keyed_seed(*key))


def keyed_normal(keys: Sequence[Key], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one independent draw per key.

    Returns:
        ``(len(keys), *shape)`` float32, drawn on the CPU and moved to `device`.
    """
    # From pinned memory the host goes on while they are copied.
    draws = torch.empty(len(keys), *shape, dtype=torch.float32, pin_memory=torch.device(device).type == "cuda")
    for key, row in zip(keys, draws, strict=True):
        row.normal_(generator=keyed_generator(*key))
    return draws.to(device, non_blocking=True)
