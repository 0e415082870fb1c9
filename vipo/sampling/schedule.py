"""Noise levels of the sampling chain."""

import torch
from torch import Tensor


def sigma_schedule(steps: int, shift: float) -> Tensor:
    """Noise levels from 1 to 0: ``linspace(1, 0, T + 1)`` with time shift ``s x / (1 + (s - 1) x)``.

    Returns:
        ``(steps + 1,)`` float32, strictly decreasing, first 1 and last 0.

    Source: Esser et al., arXiv 2403.03206, equation 23, as diffusers' flow-matching schedulers apply it.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"sigma_schedule: steps {steps} must be at least 1 and shift {shift} above 0")
    level = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * level / (1 + (shift - 1) * level)).float()
