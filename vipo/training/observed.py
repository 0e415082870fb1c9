"""What the losses of an update show, and the metrics that it becomes."""

import torch
from torch import Tensor

from vipo.objectives import Outcome
from vipo.training.distribution import Distribution


class Observed:
    """Sums over the losses of one update, kept on the device: reading each of them would make the host wait.

    Args:
        transitions: T - 1, those of the chain that can have a density.
        device: of the training.

    Attributes:
        losses, norms: of each optimizer step.
    """

    def __init__(self, transitions: int, device: torch.device) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._largest = 0.0
        self._noted: dict[str, list[Tensor]] = {}
        self._clipped = torch.zeros(transitions, device=device)
        self._seen = torch.zeros(transitions, device=device)
        # Sums of squares of log rho: before the first step it is noise, after it the policy's change.
        self._noise = torch.zeros((), device=device)
        self._change = torch.zeros(2, device=device)
        self._changes = 0
        self._has_ratio = self._has_gate = False

    def before_first_step(self, outcome: Outcome, calls: int, largest: float) -> None:
        """Note one of `calls` losses of the policy that sampled, whose log-ratios are rounding alone.

        Args:
            outcome: of the objective.
            calls: losses of the first optimizer step.
            largest: ``max |log rho|`` of it.
        """
        self._has_ratio, self._has_gate = outcome.log_ratio is not None, outcome.dropped is not None
        if outcome.log_ratio is not None:
            self._noise += outcome.log_ratio.square().mean() / calls
        self._largest = max(self._largest, largest)

    def after_first_step(self, outcome: Outcome, steps: Tensor) -> None:
        """Note a loss of the moved policy, of the transitions ``(B,)``.

        At an update's first step every ratio is 1: nothing can be dropped there.
        """
        gated = outcome.log_ratio if outcome.gated is None else outcome.gated
        if gated is not None:
            means = gated.flatten(1).mean(dim=1) if gated.ndim > 1 else gated
            self._change += torch.stack([means.square().mean(), gated.square().mean()])
        if outcome.dropped is not None:
            self._clipped.index_add_(0, steps, outcome.dropped)
            self._seen.index_add_(0, steps, torch.ones_like(outcome.dropped))
        self._changes += 1

    def note(self, outcome: Outcome) -> None:
        """Note the objective's own metrics."""
        for name, value in outcome.metrics.items():
            self._noted.setdefault(name, []).append(value.detach())

    def metrics(self, distribution: Distribution) -> dict[str, float]:
        """Over all processes; every one of them calls it."""
        count, total = distribution.processes, distribution.total
        mean_loss = torch.tensor(sum(self.losses) / len(self.losses), dtype=torch.float64)
        metrics = {"loss": float(total(mean_loss)) / count, "grad/norm": sum(self.norms) / len(self.norms)}
        clipped, seen = total(self._clipped), total(self._seen)
        if self._has_ratio:
            metrics["log_ratio/max_before_first_step"] = distribution.largest(self._largest)
            metrics["log_ratio/rms_before_first_step"] = float((total(self._noise) / count).sqrt())
        if self._has_gate:
            # With one optimizer step an update, no step has a ratio other than 1.
            metrics["clip/share"] = float(clipped.sum() / seen.sum()) if self._changes else 0.0
        if self._has_ratio and self._changes:
            sample, position = (total(self._change) / (self._changes * count)).sqrt().tolist()
            metrics |= {"log_ratio/rms_sample": sample, "log_ratio/rms_position": position}
        for name, values in self._noted.items():
            metrics[name] = float(total(torch.stack(values).mean()) / count)
        return metrics | {f"clip/share_t{t}": float(clipped[t] / seen[t]) for t in range(len(seen)) if float(seen[t])}
