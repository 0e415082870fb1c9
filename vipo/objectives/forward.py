"""What the objectives of the forward process share: noised samples, the divergence of two policies, a decay."""

import torch
from torch import Tensor

from vipo.config.forward import AwmConfig, NftConfig
from vipo.objectives.objective import Objective, Points, Share


class ForwardObjective(Objective):
    """Compares policies at the clean samples, noised to the levels of the chain."""

    options: AwmConfig | NftConfig

    @property
    def needs_old(self) -> bool:
        """What is trained is compared with what sampled."""
        return True

    @property
    def needs_reference(self) -> bool:
        """For its divergence."""
        return self.options.kl_weight > 0

    def points(self, share: Share) -> Points:
        """The clean samples, noised by draws of the share's own to the levels of `share.steps`."""
        clean = share.trajectory.clean
        drawn = [torch.randn(clean.shape[1:], generator=generator) for generator in share.draws("forward")]
        noise, times = torch.stack(drawn).to(clean.device), share.chain.times[share.steps]
        return Points(noised(clean, noise, times)[0], times, noise)


def noised(clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The forward process: ``x_t = (1 - t) x0 + t eps`` and its velocity ``eps - x0``.

    Args:
        clean: ``(B, C, [T,] H, W)`` float32, x0.
        noise: like `clean`, eps.
        times: ``(B,)`` t in [0, 1].

    Raises:
        ValueError: shapes disagree.

    Source: flow matching (arXiv 2210.02747) in the convention of diffusers.
    """
    if noise.shape != clean.shape or times.shape != clean.shape[:1]:
        raise ValueError(
            f"noise, times: expected shapes {tuple(clean.shape)} and ({len(clean)},) of clean, got "
            f"{tuple(noise.shape)} and {tuple(times.shape)}"
        )
    t = times.reshape(-1, *([1] * (clean.ndim - 1)))
    return (1 - t) * clean + t * noise, noise - clean


def ramped_decay(step: int, *, flat: int, rate: float, hold: float) -> float:
    """How much of the old policy stays after `step` optimizer steps: 0 up to `flat`, then rising to `hold`.

    ``old <- decay old + (1 - decay) policy`` after each update, ``decay = min(rate max(0, step - flat), hold)``.
    Published by DiffusionNFT's code: 0 (always on-policy); rate .001, hold .5; flat 75, rate .0075, hold .999. By
    AWM's, for its anchor: rate .001, hold .3.
    """
    return min(rate * max(0, step - flat), hold)


def velocity_kl(prediction: Tensor, other: Tensor) -> Tensor:
    """The divergence of two policies as both published codes measure it, ``mean of (v_theta - v_other)^2``.

    Args:
        prediction: ``(B, C, [T,] H, W)`` with its gradient.
        other: like `prediction`, without.

    Returns:
        ``(B,)`` float32.

    Raises:
        ValueError: shapes disagree.

    Source: the public code of DiffusionNFT and of AWM (weight 'Uniform').
    """
    if other.shape != prediction.shape:
        raise ValueError(f"other: expected shape {tuple(prediction.shape)} of prediction, got {tuple(other.shape)}")
    return (prediction.float() - other.detach().float()).square().flatten(1).mean(dim=1)
