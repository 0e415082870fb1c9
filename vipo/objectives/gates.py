"""Gates: which positions keep their gradient, by how far the policy has moved from the one that sampled."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.config.objective import GateConfig, PpoGateConfig, SymmetricGateConfig
from vipo.config.registries import GATES
from vipo.objectives.objective import ObjectiveError
from vipo.parts import Part, load_part, told


@dataclass(frozen=True)
class Moved:
    """How far the policy moved at one transition of B samples; without gradient.

    Attributes:
        log_ratio: ``(B, [T,] H, W)``, of each position; the loss's own, normalised where it is.
        advantages: ``(B, [T,] H, W)``, or ``(B,)`` where the loss has one ratio a sample.
        mean, old_mean: ``(B, C, [T,] H, W)`` of the transition, under the policy that is trained and the one that
            sampled.
        std: ``(B, 1, ...)`` of both.
    """

    log_ratio: Tensor
    advantages: Tensor
    mean: Tensor
    old_mean: Tensor
    std: Tensor

    @property
    def sample_log_ratio(self) -> Tensor:
        """``(B,)``, of the mean log-probability."""
        return self.log_ratio.flatten(1).mean(dim=1)

    def like_advantages(self, values: Tensor) -> Tensor:
        """Values ``(B,)`` of samples, for every position that has an advantage."""
        return values.reshape(-1, *([1] * (self.advantages.ndim - 1))).expand_as(self.advantages)


@dataclass(frozen=True)
class Gated:
    """What a gate decided.

    Attributes:
        dropped: bool like `Moved.advantages`, where the gradient is dropped.
        ratio: like it, what the ratio counts as there, so that the loss is continuous; None: as it is.
    """

    dropped: Tensor
    ratio: Tensor | None = None


class Gate(Part, ABC):
    """A trust region."""

    @abstractmethod
    def __call__(self, moved: Moved) -> Gated:
        """Which positions are dropped."""


class _RatioGate(Gate):
    options: PpoGateConfig | SymmetricGateConfig

    def __call__(self, moved: Moved) -> Gated:
        per_position = self.options.scope == "position"
        ratio = moved.log_ratio.exp() if per_position else moved.like_advantages(moved.sample_log_ratio.exp())
        lower, upper = self.options.bounds
        return Gated(self.dropped(ratio > upper, ratio < lower, moved.advantages), ratio.clamp(lower, upper))

    @abstractmethod
    def dropped(self, above: Tensor, below: Tensor, advantages: Tensor) -> Tensor:
        """By which side of the range the ratio is on."""


class PpoGate(_RatioGate):
    """One-sided: drops what has already moved beyond the range in the advantage's direction.

    Source: PPO (arXiv 1707.06347), equation 7; per position it is ViPO's (arXiv 2511.18719). A wider range above 1 is
    DAPO's (arXiv 2503.14476).
    """

    def dropped(self, above: Tensor, below: Tensor, advantages: Tensor) -> Tensor:
        """Those of the minimum."""
        return (above & (advantages > 0)) | (below & (advantages < 0))


class SymmetricGate(_RatioGate):
    """Drops what has moved beyond the range, on either side."""

    def dropped(self, above: Tensor, below: Tensor, advantages: Tensor) -> Tensor:
        """All of them."""
        return above | below


class NoGate(Gate):
    """Drops nothing."""

    def __call__(self, moved: Moved) -> Gated:
        """Nothing."""
        return Gated(torch.zeros_like(moved.advantages, dtype=torch.bool))


def load_gate(config: GateConfig) -> Gate:
    """The gate of a configuration.

    Raises:
        ObjectiveError: an import path is none, or names no `Gate`.
        ConfigError: an option of an import path's gate is wrong.
    """
    base: type[Gate] = Gate  # type: ignore[type-abstract]
    return load_part(config, GATES, base, ("__call__",), ObjectiveError, "gate", "objective.gate")


def checked_gated(name: str, gated: object, moved: Moved) -> Gated:
    """What a gate gave.

    Raises:
        ObjectiveError: it is something else, or of another shape or type.
    """
    if not isinstance(gated, Gated):
        raise ObjectiveError(f"gate {name!r}: expected Gated, got a {type(gated).__name__}")
    expected = moved.advantages.shape
    for part, value, dtype in (("dropped", gated.dropped, torch.bool), ("ratio", gated.ratio, moved.log_ratio.dtype)):
        if value is None and part == "ratio":
            continue
        if not isinstance(value, Tensor) or value.shape != expected or value.dtype != dtype:
            like_it = told(moved.advantages.to(dtype))
            raise ObjectiveError(f"gate {name!r}: {part}: expected {like_it}, got {told(value)}")
    return gated
