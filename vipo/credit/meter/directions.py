"""From a source's gradient to a step: its direction, its size, and the weights with it taken."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vipo.credit.meter.gradients import Chains, MeterError
from vipo.credit.meter.subject import Subject
from vipo.generators.base import Conditioning

Kind = Literal["sgd", "sign", "optimizer"]
Size = Literal["kl", "prediction", "weights"]

_CLOSE, _TRIES = 0.01, 8


@dataclass(frozen=True)
class Directions:
    """What a step makes of a gradient.

    Attributes:
        kinds: 'sgd': the gradient itself; 'sign': the sign of each entry; 'optimizer': the first step that the
            optimizer takes from it, gradient clipping and weight decay included.
        parameters: of the network.
        optimizer: of those, without any state; read by 'optimizer'.
        max_grad_norm: as the training clips.
    """

    kinds: Sequence[Kind]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None
    max_grad_norm: float = float("inf")

    def __call__(self, kind: Kind, gradient: Tensor) -> Tensor:
        """The direction ``(P,)`` in which the reward should rise, of any length; none where there is no gradient.

        Raises:
            MeterError: 'optimizer' without one.
        """
        # Of no gradient, the optimizer would make a step of weight decay alone.
        if kind == "sgd" or not bool((gradient != 0).any()):
            return gradient
        if kind == "sign":
            return gradient.sign()
        return self.first_step(gradient)

    def first_step(self, gradient: Tensor) -> Tensor:
        """By how much the optimizer's first step moves the weights ``(P,)``; they and its state are put back.

        Raises:
            MeterError: there is no optimizer, or it has taken steps.
        """
        if self.optimizer is None or self.optimizer.state:
            raise MeterError("direction 'optimizer' needs the run's optimizer before its first step")
        parameters = list(self.parameters.values())
        before = [value.detach().clone() for value in parameters]
        for value, own in zip(parameters, unflattened(gradient, parameters), strict=True):
            value.grad = -own.clone()
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        moved = [value.detach() - old for value, old in zip(parameters, before, strict=True)]
        with torch.no_grad():
            for value, old in zip(parameters, before, strict=True):
                value.copy_(old)
        return torch.cat([change.reshape(-1) for change in moved])


def unflattened(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The pieces of ``(P,)``, each of its parameter's shape."""
    pieces = vector.split([value.numel() for value in parameters])
    return [piece.reshape(value.shape).to(value.dtype) for piece, value in zip(pieces, parameters, strict=True)]


@contextlib.contextmanager
def moved_by(parameters: Sequence[nn.Parameter], step: Tensor) -> Iterator[None]:
    """Inside, the weights are moved by `step` ``(P,)``; outside they have the very bytes that they had."""
    before = [value.detach().clone() for value in parameters]
    try:
        with torch.no_grad():
            for value, own in zip(parameters, unflattened(step, parameters), strict=True):
                value.add_(own)
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(parameters, before, strict=True):
                value.copy_(old)


class Change:
    """How much a step changes the policy, on states of held-out chains.

    Attributes:
        size: 'kl': root of the mean Kullback-Leibler divergence of the transitions, a mean over channels and positions;
            'prediction': root mean square of the prediction's change; 'weights': the step's own length.
    """

    def __init__(self, subject: Subject, size: Size, batches: Sequence[Chains]) -> None:
        """Take probes: one state of each sample, the stochastic steps of the chain in turn.

        Args:
            batches: held-out ones, sampled by the policy as it is.
        """
        self.size, self._subject, self._probes = size, subject, []
        steps = list(subject.stochastic)
        for batch in batches:
            which = torch.tensor([steps[row % len(steps)] for row in batch.rows], device=batch.trajectory.clean.device)
            latents = batch.trajectory.latents[torch.arange(len(which), device=which.device), which]
            self._probes.append((latents, which, batch.conditioning))
        self._before = [self._predicted(*probe) for probe in self._probes]

    @torch.no_grad()
    def _predicted(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Tensor:
        return self._subject.generator.predict(latents, self._subject.chain.times[steps], conditioning)

    def of(self, step: Tensor) -> float:
        """Of a step ``(P,)``: linear in its length while that is small."""
        if self.size == "weights":
            return float(step.double().norm())
        squares, count = 0.0, 0
        with moved_by(list(self._subject.parameters.values()), step):
            for (latents, steps, conditioning), before in zip(self._probes, self._before, strict=True):
                difference = self._predicted(latents, steps, conditioning)
                if self.size == "kl":
                    mean, std = self._subject.chain.gaussian(latents, difference, steps)
                    old, _ = self._subject.chain.gaussian(latents, before, steps)
                    square = (mean - old) ** 2 / (2 * std**2)
                else:
                    square = (difference - before) ** 2
                squares, count = squares + float(square.double().sum()), count + square.numel()
        return (squares / count) ** 0.5

    def scaled(self, direction: Tensor, target: float, first: float | None = None) -> tuple[Tensor, float] | None:
        """The step along `direction` whose change is `target`, to within 1 %, and that change.

        Args:
            first: length to begin at; None: that of the direction.

        Returns:
            None where the direction is zero.

        Raises:
            MeterError: no length gives that change.
        """
        length = float(direction.double().norm())
        if length == 0:
            return None
        factor = 1.0 if first is None else first / length
        for _ in range(_TRIES):
            found = self.of(factor * direction)
            if abs(found / target - 1) <= _CLOSE:
                return factor * direction, found
            if not (found > 0 and found < float("inf")):
                break
            factor *= target / found
        raise MeterError(
            f"experiment.meter.change {target:g}: no step along this direction changes the policy by that much "
            f"({self.size}); give a smaller one"
        )
