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
        # Sums, and how many there are of each: processes may count unequally.
        self._noted: dict[str, Tensor] = {}
        self._clipped = torch.zeros(transitions, device=device)
        self._seen = torch.zeros(transitions, device=device)
        # Of squares of log rho: before the first step it is noise, after it the policy's change.
        self._noise = torch.zeros(1, device=device)
        self._change = torch.zeros(2, device=device)
        self._counts = {"noted": 0, "noise": 0, "change": 0}
        self._has_ratio = self._has_gate = self._moved = False

    def before_first_step(self, outcome: Outcome, largest: float, *, counts: bool) -> None:
        """Note a loss of the policy that sampled, whose log-ratios are rounding alone.

        Args:
            outcome: of the objective.
            largest: ``max |log rho|`` of it.
            counts: whether it is in the metrics.
        """
        self._has_ratio, self._has_gate = outcome.log_ratio is not None, outcome.dropped is not None
        if counts:
            if outcome.log_ratio is not None:
                self._noise += outcome.log_ratio.square().mean()
            self._counts["noise"] += 1
            self._largest = max(self._largest, largest)

    def after_first_step(self, outcome: Outcome, steps: Tensor, *, counts: bool) -> None:
        """Note a loss of the moved policy, of the transitions ``(B,)``.

        At an update's first step every ratio is 1: nothing can be dropped there.
        """
        self._moved = True
        if not counts:
            return
        gated = outcome.log_ratio if outcome.gated is None else outcome.gated
        if gated is not None:
            means = gated.flatten(1).mean(dim=1) if gated.ndim > 1 else gated
            self._change += torch.stack([means.square().mean(), gated.square().mean()])
        self._counts["change"] += 1
        if outcome.dropped is not None:
            self._clipped.index_add_(0, steps, outcome.dropped)
            self._seen.index_add_(0, steps, torch.ones_like(outcome.dropped))

    def note(self, outcome: Outcome, *, counts: bool) -> None:
        """Note the objective's own metrics."""
        for name, value in outcome.metrics.items():
            sums = self._noted.setdefault(name, torch.zeros(1, device=value.device))
            if counts:
                sums += value.detach()
        self._counts["noted"] += counts

    def metrics(self, distribution: Distribution) -> dict[str, float]:
        """Over all processes; every one of them calls it."""
        total = distribution.total

        def mean(kind: str, sums: Tensor) -> Tensor:
            # A tensor that is filled where it is: a copy would make the host wait.
            whole = total(torch.cat([sums, sums.new_full((1,), self._counts[kind])]))
            return whole[:-1] / whole[-1]

        mean_loss = torch.tensor(sum(self.losses) / len(self.losses), dtype=torch.float64)
        metrics = {
            "loss": float(total(mean_loss)) / distribution.processes,
            "grad/norm": sum(self.norms) / len(self.norms),
        }
        clipped, seen = total(self._clipped), total(self._seen)
        if self._has_ratio:
            metrics["log_ratio/max_before_first_step"] = distribution.largest(self._largest)
            metrics["log_ratio/rms_before_first_step"] = float(mean("noise", self._noise).sqrt())
        if self._has_gate:
            # With one optimizer step an update, no step has a ratio other than 1.
            metrics["clip/share"] = float(clipped.sum() / seen.sum()) if self._moved else 0.0
        if self._has_ratio and self._moved:
            sample, position = mean("change", self._change).sqrt().tolist()
            metrics |= {"log_ratio/rms_sample": sample, "log_ratio/rms_position": position}
        for name, values in self._noted.items():
            metrics[name] = float(mean("noted", values))
        return metrics | {f"clip/share_t{t}": float(clipped[t] / seen[t]) for t in range(len(seen)) if float(seen[t])}
