"""Deterministic sampling of flow matching by higher-order solvers, for objectives that need no density."""

import math
from typing import Literal

from torch import Tensor

from vipo.sampling.chain import Chain

Solver = Literal["euler", "dpm2"]


class OdeSolver:
    """Steps of the ODE, to be called for one batch from the first step to the last.

    'euler': the chain's own step. 'dpm2': DPM-Solver++ of second order with two steps (2M): Euler's step with x0_hat
    extrapolated along the log-SNR ``log((1 - sigma) / sigma)``; the first and the last step are Euler's. One network
    evaluation a step, as Euler.

    Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2; DiffusionNFT samples by it.
    """

    def __init__(self, chain: Chain, solver: Solver) -> None:
        """Before the first step.

        Args:
            chain: of a generator that predicts the velocity.
            solver: which.
        """
        self._chain, self._extrapolates = chain, solver == "dpm2"
        self._levels = chain.levels.tolist()
        self._earlier: Tensor | None = None

    def step(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """The state after step `step`.

        Args:
            latents: ``(B, C, ...)`` float32, x at the step's level.
            prediction: the velocity there.
            step: in [0, T).
        """
        if not self._extrapolates:
            return self._chain.ode(latents, prediction, step)
        sigma, after = self._levels[step : step + 2]
        clean = latents - sigma * prediction
        extrapolated = clean
        # Pure noise and clean data have no finite log-SNR.
        if self._earlier is not None and self._levels[step - 1] < 1 and after > 0:
            before = self._levels[step - 1]
            ratio = (_log_snr(after) - _log_snr(sigma)) / (_log_snr(sigma) - _log_snr(before))
            extrapolated = clean + 0.5 * ratio * (clean - self._earlier)
        self._earlier = clean
        return latents + (1 - after / sigma) * (extrapolated - latents)


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
