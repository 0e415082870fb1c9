"""Rewards that misbehave, by import path: ``bad_rewards:raises`` and so on."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def raises(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    raise RuntimeError("the judge is asleep")


def raises_on_batches(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Passes the trainer's trial on one picture, raises in the first update."""
    if len(images) > 1:
        raise RuntimeError("the judge is asleep")
    return images.mean(dim=(1, 2, 3))


def wrong_shape(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return images.mean(dim=(2, 3))


def no_tensor(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    return [0.0] * len(images)


def nan_always(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.full((len(images),), torch.nan)


def nan_sometimes(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """NaN for the first picture of a batch, infinity for the second."""
    values = images.mean(dim=(1, 2, 3))
    return torch.cat([torch.tensor([torch.nan, torch.inf])[: len(values)], values[2:]])


class Unloadable:
    def __init__(self, device: str) -> None:
        raise OSError("judge.safetensors: no such file")


class FillsDisk:
    """Brightness; after ``FILL_AFTER`` calls it fills the disk of the folder ``FILL`` up to the last page."""

    def __init__(self, device: str) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.calls += 1
        if "FILL" in os.environ and self.calls == int(os.environ["FILL_AFTER"]):
            folder = Path(os.environ["FILL"])
            disk = os.statvfs(folder)
            (folder / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize))
        return images.mean(dim=(1, 2, 3))


class Paced:
    """Brightness; a call takes ``PACE`` seconds and, while the file ``HOLD`` exists, does not return."""

    def __init__(self, device: str) -> None:
        self.seconds = float(os.environ.get("PACE", "0"))
        self.hold = Path(os.environ["HOLD"]) if "HOLD" in os.environ else None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        time.sleep(self.seconds)
        while self.hold is not None and self.hold.exists():
            time.sleep(0.05)
        return images.mean(dim=(1, 2, 3))
