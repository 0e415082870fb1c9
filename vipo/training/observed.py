"""What the calls of an update show, and the metrics that it becomes."""

import torch
from torch import Tensor

from vipo.training.distribution import Distribution


class Observed:
    """Sums over the calls of one update, kept on the device: reading each of them would make the host wait.

    Args:
        transitions: T - 1, those of the chain that have a density.
        device: of the training.

    Attributes:
        largest: ``max |log rho|`` before the first optimizer step.
        losses, norms: of each optimizer step.
        divergences: of each call, to the generator as it was; scalars on the device.
    """

    def __init__(self, transitions: int, device: torch.device) -> None:
        self.largest = 0.0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.divergences: list[Tensor] = []
        self._clipped = torch.zeros(transitions, device=device)
        self._seen = torch.zeros(transitions, device=device)
        # Sums of squares of log rho: before the first step it is noise, after it the policy's change.
        self._noise = torch.zeros((), device=device)
        self._change = torch.zeros(2, device=device)
        self._changes = 0

    def before_first_step(self, log_ratio: Tensor, calls: int) -> None:
        """Note the log-ratios ``(B, [T,] H, W)`` of one of `calls` calls, where they are rounding alone."""
        self._noise += log_ratio.square().mean() / calls

    def after_first_step(self, log_ratio: Tensor, clipped: Tensor, steps: Tensor) -> None:
        """Note a call of the moved policy: log-ratios ``(B, [T,] H, W)``, clipped shares and transitions ``(B,)``.

        At an update's first step every ratio is 1: nothing can be clipped there.
        """
        means = log_ratio.flatten(1).mean(dim=1)
        self._change += torch.stack([means.square().mean(), log_ratio.square().mean()])
        self._changes += 1
        self._clipped.index_add_(0, steps, clipped)
        self._seen.index_add_(0, steps, torch.ones_like(clipped))

    def metrics(self, distribution: Distribution) -> dict[str, float]:
        """Over all processes; every one of them calls it."""
        count, total = distribution.processes, distribution.total
        clipped, seen = total(self._clipped), total(self._seen)
        noise, change, changes = total(self._noise) / count, total(self._change), self._changes * count
        largest = distribution.largest(self.largest)
        mean_loss = torch.tensor(sum(self.losses) / len(self.losses), dtype=torch.float64)
        metrics = {
            "loss": float(total(mean_loss)) / count,
            "grad/norm": sum(self.norms) / len(self.norms),
            "log_ratio/max_before_first_step": largest,
            "log_ratio/rms_before_first_step": float(noise.sqrt()),
            # With one optimizer step an update, no step has a ratio other than 1.
            "clip/share": float(clipped.sum() / seen.sum()) if changes else 0.0,
        }
        if changes:
            sample, position = (change / changes).sqrt().tolist()
            metrics |= {"log_ratio/rms_sample": sample, "log_ratio/rms_position": position}
        if self.divergences:
            metrics["kl"] = float(total(torch.stack(self.divergences).mean()) / count)
        return metrics | {f"clip/share_t{t}": float(clipped[t] / seen[t]) for t in range(len(seen)) if float(seen[t])}
