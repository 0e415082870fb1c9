"""The source `uniform`: no position counts more than another."""

import torch

from vipo.credit.source import CreditSource, Samples, Weights


class UniformCredit(CreditSource):
    """Ones: the control for a map, with everything else that comes with one."""

    def __call__(self, samples: Samples) -> Weights:
        """Ones ``(n, [T,] H, W)``."""
        return Weights(torch.ones(len(samples), *samples.positions, device=samples.clean.device))
