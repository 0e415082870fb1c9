"""Rewards that misbehave, by import path: ``bad_rewards:raises`` and so on."""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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


def exits(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    sys.exit(0)


def interrupts(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    raise KeyboardInterrupt


class ExitsAtLoad:
    def __init__(self, device: str) -> None:
        sys.exit(0)


def quiet(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Brightness."""
    return images.mean(dim=(1, 2, 3))


def meddles(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Brightness; changes its pictures, and everything else that the rest of the run reads."""
    values = images.mean(dim=(1, 2, 3))
    images.numpy()[:] *= 2
    metadata[0].clear()  # type: ignore[attr-defined]
    os.chdir("/")
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    torch.autocast("cpu", torch.bfloat16).__enter__()
    torch.set_grad_enabled(False)
    return values


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


class Stands:
    """Brightness; call ``STAND_AT`` takes the file ``STAND``, if it is there, and stands still until a signal comes.

    So that a test knows where a run is, however long the test itself is held up. `standing` is there from then on. The
    first call is the trial on one picture, before the first update.
    """

    def __init__(self, device: str) -> None:
        self.calls, self.file = 0, Path(os.environ.get("STAND", os.devnull))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.calls += 1
        if self.calls == int(os.environ.get("STAND_AT", "0")):
            # Of several ranks one finds it; the others wait for that one.
            with contextlib.suppress(FileNotFoundError), _noticed(signal.SIGTERM, signal.SIGUSR1) as came:
                self.file.rename(standing(self.file))
                while not came:
                    time.sleep(0.05)
        return images.mean(dim=(1, 2, 3))


def standing(file: Path) -> Path:
    """What the file ``STAND`` is called as soon as a run stands still."""
    return file.with_name(f"{file.name}-taken")


@contextlib.contextmanager
def _noticed(*numbers: int) -> Iterator[list[int]]:
    """What comes of some signals in the block, which their handlers are told too."""
    came: list[int] = []
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def notice(number: int, frame: Any) -> None:
        came.append(number)
        handlers[number](number, frame)

    for number in numbers:
        signal.signal(number, notice)
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
