"""Keyed random draws: the determinism contract in one place.

Every draw comes from a CPU generator whose seed is a hash of a key such as
``(seed, "initial", update, prompt_id, sample)``. A sample's noise is therefore the same on any
number of processes and in any batch, before and after a resume. No global generator is read.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings (BLAKE2b of its canonical JSON).

    Raises:
        TypeError: a part of the key is neither an integer nor a string.
    """
    for part in key:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"noise key {key!r}: part {part!r} is neither an integer nor a string")
    text = json.dumps(key, ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for `key`."""
    return torch.Generator(device="cpu").manual_seed(keyed_seed(*key))


def keyed_normal(keys: Sequence[Key], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one independent draw per key.

    Returns:
        ``(len(keys), *shape)`` float32, drawn on the CPU and moved to `device`.
    """
    draws = [torch.randn(shape, generator=keyed_generator(*key), dtype=torch.float32) for key in keys]
    return torch.stack(draws).to(device)
