"""Where the time of an update goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timer:
    """Adds up wall-clock seconds by part: ``with timer("rollout"): ...``.

    CUDA runs behind the program, so on a CUDA device every part ends by waiting for the work it queued.

    Args:
        device: where the measured work runs.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure the block as `part`; parts may repeat (they add up) and nest (each counts its own span)."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + self._now() - start

    def pop(self) -> dict[str, float]:
        """Seconds as ``time/<part>`` since the last call; counting starts anew."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{part}": value for part, value in seconds.items()}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
